"""The CUDA ops on a device: the references' results bit for bit, on any stream, in a CUDA graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import quantkit.ops as ops

from .calibrated_cases import OPS as CALIBRATED
from .cuda_cases import (
    BLOCKS,
    FLOATS,
    FP8,
    SHAPES,
    cases,
    check,
    fp4_cases,
    matrix,
    pack_cases,
    strided,
    token_cases,
    weight_cases,
)
from .device import call, check_current_stream, check_graph, check_other_device
from .gemm_cases import OPS as GEMMS
from .test_layer_cuda import OPS as LAYER

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("cuda_kernels")]
LARGE = ((2048, 4096), (64, 28672), (20000, 136))


@pytest.mark.parametrize("shape", [(3, 6), (70, 130), (1000, 4096)], ids=str)
def test_weights(shape: tuple[int, int]) -> None:
    check(call, weight_cases(*shape))
    check(call, fp4_cases(*shape))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_blocks(block: list[int], dtype: torch.dtype) -> None:
    for shape in SHAPES:
        check(call, cases(matrix(*shape, dtype), block))


@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("block", [[1, -1], [1, 128], [128, 128], [-1, 1], [-1, -1]], ids=str)
def test_large(shape: tuple[int, int], block: list[int]) -> None:
    check(call, cases(matrix(*shape, torch.bfloat16), block))


def test_strides_and_misalignment() -> None:
    for x in strided():
        for block in ([1, -1], [1, 16], [-1, 1], [8, 8]):
            check(call, cases(x, block))


@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 100), (0, 8), (7, 14336), (300, 8192)], ids=str)
def test_tokens(shape: tuple[int, ...]) -> None:
    rows = torch.Size(shape[:-1]).numel()
    for dtype in FLOATS:
        check(call, token_cases(matrix(max(rows, 1), shape[-1], dtype)[:rows].reshape(shape)))


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 8), (4, 33), (700, 3), (70000, 16), (0, 8), (4, 0)], ids=str)
def test_packing(shape: tuple[int, int]) -> None:
    check(call, pack_cases(*shape))


@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_every_16_bit_number_to_fp8(dtype: torch.dtype) -> None:
    """On sm_89 and later the device's own conversion is used, which no test without a device sees."""
    patterns = torch.arange(65536).to(torch.uint16).view(256, 256)
    one = torch.ones(1, 1)
    for x in (patterns.view(torch.float16), patterns.view(torch.bfloat16)):
        wide = x.float().view(torch.int32)
        for source in (x, (wide - 1).view(torch.float32), (wide + 1).view(torch.float32)):
            check(call, iter([("quantize_fp8", (source, one, [-1, -1], dtype))]))


@pytest.mark.parametrize("dtype", [torch.int8, *FP8], ids=str)
def test_every_code_by_many_scales(dtype: torch.dtype) -> None:
    codes = torch.arange(256).to(torch.uint8).view(dtype).expand(512, 256)
    bits = torch.randint(-(2**31), 2**31, (512, 1), generator=torch.Generator().manual_seed(3))
    for scale in (bits.to(torch.int32).view(torch.float32), torch.exp2(torch.linspace(-34, 10, 512)).unsqueeze(1)):
        for out in FLOATS:
            check(call, iter([("dequantize", (codes, scale.contiguous(), None, [1, -1], out))]))


def all_ops() -> list[tuple[str, tuple[Any, ...]]]:
    x = matrix(130, 264, torch.bfloat16)
    found = [*cases(x, [1, 128]), *cases(x, [-1, -1]), *cases(x, [-1, 1]), *token_cases(x), *pack_cases(9, 33)]
    found += [*weight_cases(70, 136), *fp4_cases(9, 34)]
    assert {op for op, _ in found} == set(ops._library.compiled_ops("CUDA")) - CALIBRATED - GEMMS - LAYER
    return found


def reference(op: str, args: tuple[Any, ...]) -> Any:
    return ops._library.REFERENCES[op](*args)


def test_runs_on_the_current_stream() -> None:
    check_current_stream(all_ops(), reference)


def test_cuda_graph() -> None:
    check_graph(all_ops(), reference)


def test_same_bits_every_time() -> None:
    x = matrix(3000, 4096, torch.bfloat16).cuda()
    q, scale = ops.rtn_fp8(x, [1, -1])
    first = ops.quantization_error(x, q, scale, None, [1, -1])
    for _ in range(10):
        again = ops.quantization_error(x, q, scale, None, [1, -1])
        assert torch.equal(first.view(torch.int64), again.view(torch.int64))


def test_more_than_two_to_the_31_elements() -> None:
    rows, cols = 70000, 32768  # rows beyond 65535, offsets beyond 32 bits
    if torch.cuda.mem_get_info()[0] < 4 * rows * cols:
        pytest.skip("too little free memory on the device")
    x = torch.zeros(rows, cols, dtype=torch.bfloat16, device="cuda")
    x[-1] = torch.arange(cols, device="cuda") % 128
    q, scale, _ = ops.int8_quant_per_token(x)
    assert scale[-1].item() == 1.0 and torch.equal(q[-1].cpu(), (torch.arange(cols) % 128).to(torch.int8))
    assert not q[:-1].any() and ops.absmax(x, [-1, -1]).item() == 127.0


def test_other_device() -> None:
    check_other_device(all_ops())
