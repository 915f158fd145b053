"""The CUDA sources, kernels and torch boundary, run on the CPU and compared with the references bit for bit.

Proves indexing, synchronisation and arithmetic, within the buffers and in any order of threads; says nothing of speed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import quantkit.ops as ops

from . import emulated_cuda
from .cuda_cases import (
    BLOCKS,
    FLOATS,
    FP8,
    SHAPES,
    assert_same,
    cases,
    check,
    fp4_cases,
    matrix,
    pack_cases,
    strided,
    token_cases,
    weight_cases,
)

pytestmark = [
    pytest.mark.skipif(emulated_cuda.compiler() is None, reason="no C++ compiler: set CXX"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks(emulated: Any, shape: tuple[int, int], block: list[int]) -> None:
    seed = SHAPES.index(shape) + BLOCKS.index(block)
    check(emulated, cases(matrix(*shape, FLOATS[seed % 3], seed), block))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_dtype(emulated: Any, dtype: torch.dtype) -> None:
    for block in ([1, -1], [1, 32], [16, 16], [-1, 1], [-1, -1]):
        check(emulated, cases(matrix(40, 160, dtype), block))


def test_strides(emulated: Any) -> None:
    for x in strided():
        for block in ([1, -1], [1, 16], [-1, 1], [8, 8]):
            check(emulated, cases(x, block))
    codes = torch.randint(-8, 8, (24, 40), dtype=torch.int8)
    for q in (codes.t(), codes[:, 1:33], codes[:, ::2]):
        check(emulated, iter([("pack_int32", (q, 4)), ("pack_int32", (q, 8))]))
        check(emulated, iter([("dequantize", (q, torch.ones(q.shape[0], 1), None, [1, -1], torch.float32))]))


@pytest.mark.parametrize("block", [[1, -1], [-1, -1], [-1, 1], [256, 600]], ids=str)
def test_blocks_beyond_registers_and_one_pass(emulated: Any, block: list[int]) -> None:
    check(emulated, cases(matrix(512, 600, torch.float32), block))
    check(emulated, cases(matrix(2, 40000, torch.bfloat16), block))


def test_a_column_of_blocks_wider_than_any_tile(emulated: Any) -> None:
    check(emulated, cases(matrix(3, 140000, torch.float16), [-1, -1]))
    check(emulated, iter([("fp8_quant_per_token", (matrix(1, 300000, torch.bfloat16), torch.float8_e4m3fn))]))


@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 100), (2, 1, 3, 7), (0, 8), (2, 0, 8)], ids=str)
def test_tokens(emulated: Any, shape: tuple[int, ...]) -> None:
    for dtype in FLOATS:
        flat = matrix(max(torch.Size(shape[:-1]).numel(), 1), shape[-1], dtype)
        x = flat[: torch.Size(shape[:-1]).numel()].reshape(shape)
        check(emulated, token_cases(x))
        if len(shape) == 3:
            check(emulated, token_cases(torch.cat([x, x], -1)[..., : shape[-1]]))


def test_tokens_without_values(emulated: Any) -> None:
    codes, scale, zero_point = emulated("int8_quant_per_token", (torch.empty(3, 0), False))
    assert codes.shape == (3, 0) and zero_point.tolist() == [[-128]] * 3
    assert scale.tolist() == [[ops.MIN_SCALE[torch.float32]]] * 3


def test_tokens_that_are_no_even_run(emulated: Any) -> None:
    with pytest.raises(RuntimeError, match=r"int8_quant_per_token: the dimensions of x .*contiguous"):
        emulated("int8_quant_per_token", (matrix(24, 8, torch.float32).view(2, 3, 4, 8).transpose(0, 1), True))


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 8), (9, 9), (4, 33), (2, 4096), (700, 3)], ids=str)
def test_packing(emulated: Any, shape: tuple[int, int]) -> None:
    check(emulated, pack_cases(*shape))


@pytest.mark.parametrize("shape", [(1, 1), (3, 6), (64, 32), (70, 129), (130, 264), (5, 1100)], ids=str)
def test_weights(emulated: Any, shape: tuple[int, int]) -> None:
    check(emulated, weight_cases(*shape))
    check(emulated, fp4_cases(shape[0], shape[1] + shape[1] % 2))


def test_weights_without_values(emulated: Any) -> None:
    check(emulated, weight_cases(0, 8))
    check(emulated, fp4_cases(0, 8))
    check(emulated, fp4_cases(4, 0))
    for op, codes in (("pack_w8a8", torch.int8), ("pack_fp8", torch.float8_e4m3fn)):
        check(emulated, iter([(op, (torch.empty(70, 0, dtype=codes),))]))
    # Columns that there are not: zero bits, whatever the others are.
    words, perm = (
        torch.full((3, 2), -1, dtype=torch.int32),
        torch.tensor([3, -1, 900, 0, 1, 2, 4, 5, 6], dtype=torch.int32),
    )
    packed = emulated("pack_wna16", (words, 4, 9, perm))
    assert packed[0, 0, 0].item() & 0x000F00F0 == 0 and (packed[0, 0, :3] == packed[0, 0, 0]).all()


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0, 0)], ids=str)
def test_empty(emulated: Any, shape: tuple[int, int]) -> None:
    x = torch.empty(shape, dtype=torch.bfloat16)
    for block in ([-1, -1], [1, -1], [1, 16], [-1, 1], [300000, 3]):
        check(emulated, ((op, args) for op, args in cases(x, block)))
    check(emulated, pack_cases(*shape))


@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_every_16_bit_number_to_fp8(emulated: Any, dtype: torch.dtype) -> None:
    patterns = torch.arange(65536).to(torch.uint16).view(256, 256)
    one = torch.ones(1, 1)
    for x in (patterns.view(torch.float16), patterns.view(torch.bfloat16)):
        check(emulated, iter([("quantize_fp8", (x, one, [-1, -1], dtype))]))
        # Between two neighbours of the 16-bit formats, ties of FP8 included, just above and just below.
        wide = x.float().view(torch.int32)
        for step in (-1, 1):
            check(emulated, iter([("quantize_fp8", ((wide + step).view(torch.float32), one, [-1, -1], dtype))]))


@pytest.mark.parametrize("dtype", [torch.int8, *FP8], ids=str)
def test_every_code_by_many_scales(emulated: Any, dtype: torch.dtype) -> None:
    codes = torch.arange(256).to(torch.uint8).view(dtype).expand(512, 256)
    bits = torch.randint(-(2**31), 2**31, (512, 1), generator=torch.Generator().manual_seed(3))
    scale = bits.to(torch.int32).view(torch.float32).contiguous()
    for out in FLOATS:
        check(emulated, iter([("dequantize", (codes, scale, None, [1, -1], out))]))
    # Around the range of float16, subnormals and the last finite step included.
    scale = torch.exp2(torch.linspace(-34, 10, 512)).unsqueeze(1)
    check(emulated, iter([("dequantize", (codes, scale, None, [1, -1], torch.float16))]))


def test_scale_edges(emulated: Any) -> None:
    edges = torch.tensor([0.0, -0.0, 1e-45, 2.0**-100, 2.0**-24, 1e-38, 65504.0, 1e38, float("inf"), float("nan")])
    low, high = torch.meshgrid(edges, edges, indexing="ij")
    for dtype in FLOATS:
        check(emulated, iter([("symmetric_scale", (edges, 127.0, dtype)), ("symmetric_scale", (edges, 1e-3, dtype))]))
        for sign in (-1.0, 1.0):
            args = ((sign * low).contiguous(), high.contiguous())
            check(emulated, iter([("asymmetric_scale", (*args, lo, hi, dtype)) for lo, hi in ((-128, 127), (-8, 7))]))


def test_codes_at_the_edges(emulated: Any) -> None:
    x = torch.cat([torch.arange(-300, 300) + 0.5, torch.tensor([3e38, -3e38, 2.0**24 + 2, 2.0**23 + 1])]).view(1, -1)
    for zero_point in (-128, -3, 0, 127):
        z = torch.tensor([[zero_point]], dtype=torch.int8)
        for scale in (0.5, 1.0, 3.0, 0.0, 1e-45, float("inf"), float("nan"), -1.0):
            check(emulated, iter([("quantize_int", (x, torch.tensor([[scale]]), z, [1, -1], -128, 127))]))
            check(emulated, iter([("quantize_int", (x, torch.tensor([[scale]]), z, [1, -1], -8, 7))]))


@pytest.mark.parametrize(
    ("op", "args", "words"),
    [
        ("absmax", (torch.ones(2, 2, dtype=torch.int8), [1, -1]), "x must be float32, float16 or bfloat16"),
        ("absmax", (torch.ones(2), [1, -1]), r"x must be 2-D \[rows, cols\], got 1-D"),
        ("minmax", (torch.ones(2, 2), [0, 1]), "block sizes must be positive"),
        ("quantize_int", (torch.ones(2, 4), torch.ones(2, 2), None, [1, -1], -8, 7), r"scale must be float32 \[2, 1\]"),
        ("quantize_int", (torch.ones(2, 4), torch.ones(2, 1), None, [1, -1], -300, 7), "must fit int8"),
        ("rtn_int", (torch.ones(2, 4), [1, -1], -8, 7, True, 7.5, torch.float32, 3), "pack_bits must be 0, 4 or 8"),
        ("rtn_fp8", (torch.ones(2, 4), [1, -1], torch.int8), "dtype must be float8_e4m3fn or float8_e5m2"),
        ("pack_int32", (torch.ones(2, 4, dtype=torch.int8), 3), "num_bits must be 4 or 8"),
        ("unpack_int32", (torch.ones(2, 4, dtype=torch.int32), 4, 99), "99 columns of 4 bits take 13 words a row"),
        ("symmetric_scale", (torch.ones(2, 4).t(), 127.0, torch.float32), "amax must be contiguous"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(emulated: Any, op: str, args: tuple[Any, ...], words: str) -> None:
    with pytest.raises(RuntimeError, match=f"quantkit::{op}: .*{words}"):
        emulated(op, args)


NONE, MISSING_BARRIER, UNWRITTEN, READ_PAST, READ_BEFORE = range(5)  # as in tests/cuda_emulation/faults.h
WRITE_PAST, WRITE_BEFORE, SHARED_PAST, MISALIGNED, DIVERGED, MISSING_WAIT, EARLY_OVERWRITE = range(5, 12)


def fault(kind: int, seed: int) -> Tensor:
    torch.ops.quantkit_emulated.set_seed(seed)
    return torch.ops.quantkit_emulated.fault(torch.ops.quantkit_emulated.guarded(torch.arange(64.0)), kind)


@pytest.mark.parametrize(
    ("kind", "seed", "words"),
    [
        (READ_PAST, 0, "access 256 bytes from the beginning of a buffer of 256 bytes"),
        (READ_BEFORE, 1, "access -4 bytes from the beginning of a buffer of 256 bytes"),
        (WRITE_PAST, 0, "access 256 bytes"),
        (WRITE_PAST, 1, "a write 256 bytes from the beginning of a buffer of 256 bytes"),
        (WRITE_BEFORE, 0, "a write -4 bytes"),
        (WRITE_BEFORE, 1, "access -4 bytes"),
        (SHARED_PAST, 0, "access 256 bytes"),
        (MISALIGNED, 0, "a vector of 8 bytes is not aligned"),
        (DIVERGED, 0, "deadlock: .* at barrier.* at shuffle_xor|deadlock: .* at shuffle_xor.* at barrier"),
    ],
)
def test_the_emulation_finds_faults(library: Any, kind: int, seed: int, words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        fault(kind, seed)
    assert_same("fault", fault(NONE, seed), torch.arange(64.0).flip(0))  # and is fit for use afterwards


def test_the_emulation_shows_a_missing_barrier(library: Any) -> None:
    assert all(not torch.equal(fault(MISSING_BARRIER, seed), torch.arange(64.0).flip(0)) for seed in range(4))
    assert fault(UNWRITTEN, 0).isnan().all()


def test_the_emulation_shows_misused_asynchronous_copies(library: Any) -> None:
    wanted = torch.arange(64.0).flip(0)
    assert all(fault(MISSING_WAIT, seed).isnan().any() for seed in (0, 2))  # landed too late
    assert all(not torch.equal(fault(EARLY_OVERWRITE, seed), wanted) for seed in range(4))  # and too early
