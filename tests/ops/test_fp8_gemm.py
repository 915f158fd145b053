"""fp8_gemm against fp64 of the exact codes and scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import quantkit.ops as ops
from quantkit.ops._library import expand, grid
from quantkit.ops.fp8_gemm import unpack_codes

from .cpu_cases import FLOATS, call, check_refused, reference

E4M3 = torch.float8_e4m3fn
# (N, K, block): panels of 64 columns, slices of K, odd ends; blocks of every kind.
WEIGHTS = (
    (1, 1, [-1, -1]),
    (3, 45, [1, -1]),
    (70, 96, [-1, -1]),
    (64, 640, [128, 128]),
    (130, 1100, [1, -1]),
    (129, 576, [128, 128]),
    (100, 300, [128, 128]),
    (33, 37, [3, 5]),
    (66, 130, [1, 32]),
)
INPUTS = ("none", "static", [-1, -1], [1, -1], [1, 128], [1, 5])
ROWS = (1, 3, 6, 13, 37)


@dataclass
class Weight:
    codes: Tensor
    scale: Tensor
    block: list[int]

    def exact(self) -> Tensor:
        return self.codes.double() * expand(self.scale.double(), *self.codes.shape, self.block)

    def arguments(self, x: Tensor, how: Any = "none", bias: Tensor | None = None) -> tuple[Any, ...]:
        scale = torch.tensor([0.013]) if how == "static" else None
        block = None if how in ("none", "static") else how
        packed = ops.pack_fp8(self.codes)
        return (x, packed, self.scale, self.block, len(self.codes), scale, block, bias)


def weight(rows: int, cols: int, block: list[int]) -> Weight:
    """Every finite code, subnormals and zeros not rarely; scales of either sign."""
    generator = torch.Generator().manual_seed(rows * cols)
    bits = torch.randint(0, 256, (rows, cols), generator=generator)
    small = torch.randint(0, 20, (rows, cols), generator=generator) | (bits & 0x80)
    bits = torch.where(torch.rand(rows, cols, generator=generator) < 0.3, small, bits)
    bits = torch.where((bits & 0x7F) == 0x7F, bits - 1, bits)
    scale = torch.rand(grid(rows, cols, block), generator=generator) - 0.1
    return Weight(bits.to(torch.uint8).view(E4M3), scale, block)


def activations(x: Tensor, how: Any) -> Tensor:
    """What is multiplied, fp64."""
    if how == "none":
        return x.double()
    if how == "static":
        scale = torch.tensor([[0.013]])
        return ops.quantize_fp8(x, scale, [-1, -1]).double() * scale.double()
    codes, scale = ops.rtn_fp8(x, how)
    return codes.double() * expand(scale.double(), *x.shape, how)


def check_close(w: Weight, x: Tensor, how: Any, y: Tensor, bias: Tensor | None = None) -> None:
    """Sums of K products and of the segments in fp32, in any order, then one rounding to y's dtype."""
    a, cols = activations(x, how), x.shape[1]
    exact, size = a @ w.exact().T, a.abs() @ w.exact().abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    group = how[1] if isinstance(how, list) and how[1] > 0 else cols
    block = w.block[1] if w.block[1] > 0 else cols
    segments = len({*range(0, cols, group), *range(0, cols, block)})
    step = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}[y.dtype]
    bound = (cols + segments + 4) * 2**-24 * size
    assert y.dtype == x.dtype
    limit = torch.finfo(y.dtype).max
    assert ((y.double() - exact.clamp(-limit, limit)).abs() <= bound + step * (exact.abs() + bound) + 2**-25).all()


def check_same_nan(y: Tensor, expected: Tensor) -> None:
    assert torch.equal(y.isnan(), expected.isnan())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("how", INPUTS, ids=str)
def test_like_fp64(how: Any, dtype: torch.dtype) -> None:
    for rows, cols, block in WEIGHTS:
        w = weight(rows, cols, block)
        w.scale *= 1e-3  # within fp16
        for m in ROWS:
            generator = torch.Generator().manual_seed(m)
            x = torch.randn(m, cols + 3, generator=generator).to(dtype)[:, 1 : cols + 1]
            bias = torch.randn(rows, generator=generator).to(dtype if m % 2 else torch.float32) if m % 3 else None
            arguments = w.arguments(x, how, bias)
            check_close(w, x, how, call("fp8_gemm", *arguments), bias)
            if m == 13 and how != [1, 5]:
                check_close(w, x, how, reference("fp8_gemm", *arguments), bias)


def test_each_code_exactly() -> None:
    """One weight times one: all 256 codes, through every place of a panel and of a quad of k."""
    bits = torch.arange(256, dtype=torch.int64)
    for k in range(4):
        codes = torch.zeros(256, 5, dtype=torch.uint8)
        codes[:, k] = bits.to(torch.uint8)
        w = Weight(codes.view(E4M3), torch.ones(1, 1), [-1, -1])
        for dtype in FLOATS:
            for m in (1, 7):
                x = torch.zeros(m, 5, dtype=dtype)
                x[:, k] = 1.0
                y = ops.fp8_gemm(x, ops.pack_fp8(w.codes), w.scale, w.block, 256)
                expected = w.codes[:, k].to(dtype).expand(m, 256)
                torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


def test_activation_codes_are_those_of_the_ops() -> None:
    """A weight that picks one column: the result is that column's code times its scale, with no rounding but that."""
    x = torch.randn(9, 200) * 3
    codes = torch.eye(200).to(E4M3)
    scale = torch.ones(200, 1)
    for how in INPUTS[1:]:
        w = Weight(codes, scale, [1, -1])
        y = call("fp8_gemm", *w.arguments(x, how))
        assert torch.equal(y, activations(x, how).float())


@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_stays(dtype: torch.dtype) -> None:
    w = weight(70, 260, [128, 128])
    w.codes.view(torch.uint8)[3, 7], w.codes.view(torch.uint8)[69, 259] = 0x7F, 0xFF
    for how in INPUTS:
        for m in (1, 7):
            x = torch.randn(m, 260).to(dtype)
            y = call("fp8_gemm", *w.arguments(x, how))
            assert y.isnan().any(0).nonzero().flatten().tolist() == [3, 69]
            assert y[:, [3, 69]].isnan().all()
            x[m - 1, 130] = float("nan")
            y = call("fp8_gemm", *w.arguments(x, how))
            assert y[m - 1].isnan().all()
            check_same_nan(y, reference("fp8_gemm", *w.arguments(x, how)))


def test_zero_rows_and_infinities() -> None:
    w = weight(70, 260, [128, 128])
    x = torch.randn(4, 260)
    x[1], x[2, 200] = 0.0, float("inf")
    for how in INPUTS:
        y = call("fp8_gemm", *w.arguments(x, how))
        assert how == [-1, -1] or y[1].eq(0).all()
        check_same_nan(y, reference("fp8_gemm", *w.arguments(x, how)))


def test_subnormals_survive_flushing() -> None:
    """Codes below 2^-6 are no subnormals of the arithmetic."""
    w = Weight(torch.arange(8, dtype=torch.uint8).view(8, 1).view(E4M3), torch.ones(1, 1), [-1, -1])
    torch.set_flush_denormal(True)
    try:
        for dtype in FLOATS:
            y = call("fp8_gemm", *w.arguments(torch.ones(1, 1, dtype=dtype)))
            assert torch.equal(y[0], (torch.arange(8) * 2.0**-9).to(dtype))
    finally:
        torch.set_flush_denormal(False)


def test_threads_leave_no_trace() -> None:
    w = weight(200, 700, [128, 128])
    threads = torch.get_num_threads()
    try:
        for dtype in FLOATS:
            for how in INPUTS:
                x = torch.randn(40, 700).to(dtype)
                results = []
                for n in (1, 2, 3):
                    torch.set_num_threads(n)
                    results.append(call("fp8_gemm", *w.arguments(x, how)))
                assert torch.equal(results[0], results[1])
                assert torch.equal(results[0], results[2])
    finally:
        torch.set_num_threads(threads)


def test_pack_is_the_layout_of_the_reference() -> None:
    for rows, cols, block in WEIGHTS:
        codes = weight(rows, cols, block).codes
        codes.view(torch.uint8)[rows // 2, cols // 2] = 0xFF
        wide = torch.cat([codes.view(torch.uint8)] * 2, 1).view(E4M3)
        for stored in (codes, wide[:, :cols]):
            packed = call("pack_fp8", stored)
            assert torch.equal(packed, reference("pack_fp8", stored))
        unpacked = unpack_codes(packed, rows, cols)
        assert torch.equal(unpacked.view(torch.uint8), codes.view(torch.uint8))


def test_nothing_in_nothing_out() -> None:
    w = weight(70, 96, [128, 128])
    assert call("fp8_gemm", *w.arguments(torch.zeros(0, 96), [1, 128])).shape == (0, 70)
    empty = Weight(torch.zeros(0, 96).to(E4M3), torch.ones(0, 1), [1, -1])
    assert call("fp8_gemm", *empty.arguments(torch.zeros(3, 96))).shape == (3, 0)
    flat = Weight(torch.zeros(70, 0).to(E4M3), torch.ones(70, 0), [1, -1])
    bias = torch.randn(70)
    for how in ("none", "static", [1, -1]):
        y = call("fp8_gemm", *flat.arguments(torch.zeros(3, 0), how, bias))
        assert torch.equal(y, bias.expand(3, 70))


def test_refuses() -> None:
    w, x = weight(70, 96, [1, 32]), torch.ones(2, 96)
    arguments = w.arguments(x)

    def refused(message: str, place: int, value: Any, base: tuple[Any, ...] = arguments) -> None:
        check_refused("fp8_gemm", message, *base[:place], value, *base[place + 1 :])

    refused("x must be 2-D", 0, x[0])
    refused("x must be float32, float16 or bfloat16, got torch.int32", 0, x.int())
    refused(r"packed must be what pack_fp8 makes of torch.float8_e4m3fn \[70, 88\]", 0, x[:, :88])
    refused(r"contiguous torch.int8 \[2, 6400\], got torch.int8 \[1, 6400\]", 1, arguments[1][:1])
    refused(r"weight_scale must be contiguous torch.float32 \[70, 3\] for the weight \[70, 96\]", 2, w.scale[:, :2])
    refused("weight_scale must be contiguous torch.float32", 2, w.scale.double())
    refused("weight_scale must be contiguous torch.float32", 2, torch.ones(3, 70).T)
    refused(r"weight_block must be \[rows, cols\], positive or -1 for the whole extent, got \[1, 0\]", 3, [1, 0])
    refused(r"weight_block must be \[rows, cols\]", 3, [1])
    refused(r"makes of torch.float8_e4m3fn \[200, 96\]", 4, 200)
    refused("out_features must not be negative, got -1", 4, -1)
    refused(r"input_scale must be torch.float32 \[1\], got torch.float32 \[2\]", 5, torch.ones(2))
    refused(r"input_block must be \[-1, -1\] \(tensor\), \[1, -1\] \(token\)", 6, [2, -1])
    refused(r"input_block must be .* got \[1, 0\]", 6, [1, 0])
    static = w.arguments(x, "static")
    refused(
        r"input_scale is one for the tensor: input_block must be \[-1, -1\] or None, got \[1, -1\]", 6, [1, -1], static
    )
    refused(r"bias must be contiguous torch.float32 or x's dtype \[70\], got torch.float16", 7, torch.ones(70).half())
    check_refused("pack_fp8", r"codes must be torch.float8_e4m3fn \[N, K\], got torch.float32 \[2, 96\]", x)
    refused("x must have its last dimension contiguous", 0, torch.ones(96, 2).T)


def test_compiles() -> None:
    w = weight(70, 96, [1, 32])
    overload = torch.ops.quantkit.fp8_gemm.default
    utils = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")  # no test_schema for FP8
    torch.library.opcheck(torch.ops.quantkit.pack_fp8.default, (w.codes,), test_utils=utils)
    for how in ("static", [1, 128]):
        arguments = w.arguments(torch.randn(3, 96), how, torch.randn(70))
        torch.library.opcheck(overload, arguments)
        torch.compiler.reset()
        compiled = torch.compile(lambda *inputs: overload(*inputs), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*arguments), overload(*arguments))
