"""wna16_gemm against fp64 of the exact weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import quantkit.ops as ops

from .cpu_cases import FLOATS, call, check_refused, reference

# (N, K, group): panels of 64 channels, words of 8 and 4 codes, slices of K, ragged ends; groups inside a word.
WEIGHTS = ((1, 8, 8), (3, 45, 9), (70, 96, 32), (64, 640, 128), (130, 1100, -1), (40, 300, 20), (129, 576, 64))
ROWS = (1, 2, 4, 5, 19)


@dataclass
class Weight:
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    perm: Tensor | None
    bits: int
    group: int

    def packed(self) -> Tensor:
        return ops.pack_wna16(ops.pack_int32(self.codes, self.bits), self.bits, self.codes.shape[1], self.perm)

    def exact(self, magnitudes: bool = False) -> Tensor:
        """fp64 [N, K] in the order of x's columns; with `magnitudes` (|code| + |zero point|) |scale|."""
        codes = self.codes.double() if self.perm is None else self.codes[:, self.perm.long()].double()
        scale = self.scale.double().repeat_interleave(codes.shape[1] // self.scale.shape[1], 1)
        zero = torch.zeros_like(scale)
        if self.zero_point is not None:
            zero = self.zero_point.double().repeat_interleave(codes.shape[1] // self.scale.shape[1], 1)
        weight = (codes.abs() + zero.abs()) * scale.abs() if magnitudes else (codes - zero) * scale
        if self.perm is None:
            return weight
        return torch.empty_like(weight).index_copy_(1, self.perm.long(), weight)

    def arguments(self, x: Tensor, bias: Tensor | None = None) -> tuple[Any, ...]:
        n = len(self.codes)
        return (x, self.packed(), self.scale, self.zero_point, self.perm, bias, self.bits, n, self.group)


def weight(
    rows: int, cols: int, group: int, bits: int, *, zero: bool = False, perm: bool = False, dtype: Any = torch.float32
) -> Weight:
    generator = torch.Generator().manual_seed(rows * cols + bits)
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    groups = 1 if group == -1 else cols // group
    codes = torch.randint(low, high, (rows, cols), dtype=torch.int8, generator=generator)
    scale = (torch.rand(rows, groups, generator=generator) - 0.1).to(dtype)
    zero_point = torch.randint(low, high, (rows, groups), dtype=torch.int8, generator=generator) if zero else None
    order = torch.randperm(cols, generator=generator).int() if perm else None
    return Weight(codes, scale, zero_point, order, bits, group)


def check_close(w: Weight, x: Tensor, y: Tensor, bias: Tensor | None = None) -> None:
    """Sums of K products and G scaled sums in fp32, in any order, then one rounding to y's dtype."""
    exact, size = x.double() @ w.exact().T, x.double().abs() @ w.exact(magnitudes=True).T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    step = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}[y.dtype]
    bound = (x.shape[1] + w.scale.shape[1] + 4) * 2**-24 * size
    assert y.dtype == x.dtype
    assert ((y.double() - exact).abs() <= bound + step * (exact.abs() + bound) + 2**-25 * (step > 0)).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", [4, 8])
def test_like_fp64(bits: int, dtype: torch.dtype) -> None:
    for i, (rows, cols, group) in enumerate(WEIGHTS):
        w = weight(rows, cols, group, bits, zero=i % 2 == 1, perm=i % 3 == 1, dtype=FLOATS[i % 3])
        for m in ROWS:
            x = torch.randn(m, cols + 3).to(dtype)[:, 1 : cols + 1]
            bias = torch.randn(rows).to(dtype if m % 2 else torch.float32) if m % 3 else None
            arguments = w.arguments(x, bias)
            for y in (call("wna16_gemm", *arguments), reference("wna16_gemm", *arguments)):
                check_close(w, x, y, bias)


@pytest.mark.parametrize("bits", [4, 8])
def test_pack_is_the_layout_of_the_reference(bits: int) -> None:
    for i, (rows, cols, _) in enumerate(WEIGHTS):
        w = weight(rows, cols, -1, bits, perm=i % 2 == 1)
        words = ops.pack_int32(w.codes, bits)
        wide = torch.cat([words, words], 1)[:, : words.shape[1]]
        for stored in (words, wide):
            arguments = (stored, bits, cols, w.perm)
            assert torch.equal(call("pack_wna16", *arguments), reference("pack_wna16", *arguments))


@pytest.mark.parametrize("bits", [4, 8])
def test_scales_by_panels_are_the_same_scales(bits: int) -> None:
    for i, (rows, cols, group) in enumerate(WEIGHTS):
        w = weight(rows, cols, group, bits, zero=i % 2 == 1, perm=i % 3 == 1, dtype=FLOATS[i % 3])
        scale, zero = ops.pack_wna16_scales(w.scale), w.zero_point
        placed = None if zero is None else ops.pack_wna16_scales(zero)
        assert scale.shape == ((rows + 63) // 64, w.scale.shape[1], 64)
        for m in (1, 3, 19):
            x, packed, *rest = w.arguments(torch.randn(m, cols).to(FLOATS[(i + m) % 3]))
            arguments = (x, packed, scale, placed, *rest[2:])
            assert torch.equal(call("wna16_gemm", *arguments), call("wna16_gemm", x, packed, *rest))
            assert torch.equal(reference("wna16_gemm", *arguments), reference("wna16_gemm", x, packed, *rest))


def test_nothing_in_nothing_out() -> None:
    w = weight(70, 96, 32, 4)
    assert call("wna16_gemm", *w.arguments(torch.zeros(0, 96))).shape == (0, 70)
    empty = weight(0, 96, 32, 4)
    assert call("wna16_gemm", *empty.arguments(torch.zeros(3, 96))).shape == (3, 0)


def test_refuses() -> None:
    w, x = weight(70, 96, 32, 4), torch.ones(2, 96)
    arguments = w.arguments(x)

    def refused(message: str, place: int, value: Any) -> None:
        check_refused("wna16_gemm", message, *arguments[:place], value, *arguments[place + 1 :])

    refused("x must be 2-D", 0, x[0])
    refused("x must be float32, float16 or bfloat16, got torch.int32", 0, x.int())
    refused("x must have its last dimension contiguous", 0, torch.ones(96, 2).T)
    refused(r"packed must be what pack_wna16 makes of 4 bits \[70, 88\]", 0, x[:, :88])
    refused(r"contiguous torch.int32 \[2, 12, 64\], got torch.int32 \[1, 12, 64\]", 1, arguments[1][:1])
    refused(r"weight_scale must be contiguous \[70, 3\] for group_size 32, or .*, got \[70, 2\]", 2, w.scale[:, :2])
    refused(r"or pack_wna16_scales of it, \[2, 3, 64\], got \[3, 2, 64\]", 2, torch.ones(3, 2, 64))
    refused("weight_scale must be float32", 2, w.scale.double())
    refused(r"weight_zero_point must be contiguous torch.int8 \[70, 3\]", 3, w.scale)
    refused(r"weight_zero_point must be contiguous torch.int8 \[70, 3\]", 3, ops.pack_wna16_scales(w.scale.char()))
    refused(r"perm must be torch.int32 \[96\], got torch.int64 \[96\]", 4, torch.arange(96))
    refused("perm must hold columns 0 to 95, got 96", 4, torch.arange(1, 97).int())
    refused("bias must be contiguous torch.float32 or torch.float32", 5, torch.ones(70).half())
    refused("num_bits must be 4 or 8, got 3", 6, 3)
    refused(r"makes of 4 bits \[200, 96\]", 7, 200)
    refused("group_size must be -1 or divide in_features 96, got 36", 8, 36)
    words = torch.zeros(3, 12, dtype=torch.int32)
    check_refused("pack_wna16", "num_bits must be 4 or 8", words, 5, 96, None)
    check_refused("pack_wna16", r"words must be torch.int32 \[N, 13\] for 97 codes of 4 bits", words, 4, 97, None)
    check_refused("pack_wna16", "in_features must be positive, got 0", words, 4, 0, None)
    check_refused("pack_wna16", "perm must hold columns 0 to 95, got -1", words, 4, 96, torch.arange(-1, 95).int())
    with pytest.raises(RuntimeError, match="pack_wna16_scales: values must be 2-D"):
        ops.pack_wna16_scales(torch.ones(3))


def test_compiles() -> None:
    w = weight(70, 96, 32, 4, zero=True, perm=True)
    arguments = w.arguments(torch.randn(3, 96), torch.randn(70))
    overload = torch.ops.quantkit.wna16_gemm.default
    torch.library.opcheck(overload, arguments)
    torch.library.opcheck(torch.ops.quantkit.pack_wna16.default, (ops.pack_int32(w.codes, 4), 4, 96, w.perm))
    compiled = torch.compile(lambda *inputs: overload(*inputs), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), overload(*arguments))


@pytest.mark.parametrize("by_panels", [False, True])
@pytest.mark.parametrize("rows", [1, 70])
def test_threads_leave_no_trace(rows: int, by_panels: bool) -> None:
    w = weight(200, 640, 64, 4, zero=True, perm=True)
    x, packed, scale, zero, *rest = w.arguments(torch.randn(rows, 640).bfloat16())
    if by_panels:
        scale, zero = ops.pack_wna16_scales(scale), ops.pack_wna16_scales(zero)
    arguments = (x, packed, scale, zero, *rest)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(call("wna16_gemm", *arguments))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_rows_beyond_a_block_of_tiles() -> None:
    w = weight(70, 264, 88, 8, zero=True)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(300, 264).to(dtype)
        check_close(w, x, call("wna16_gemm", *w.arguments(x)))


@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_and_infinity_stay_in_their_rows(dtype: torch.dtype) -> None:
    w = weight(70, 96, 32, 4, zero=True)
    x = torch.randn(9, 96)
    x[2, 5], x[7, 95] = float("nan"), -float("inf")
    y = call("wna16_gemm", *w.arguments(x.to(dtype)))
    finite = y.isfinite()
    assert not finite[2].any()
    # Infinity times a weight of zero is NaN; with its zero point taken off apart, so may any weight be.
    assert not finite[7].any()
    kept = [0, 1, 3, 4, 5, 6, 8]
    assert finite[kept].all()
    check_close(w, x[kept].to(dtype), y[kept])


@pytest.mark.parametrize("groups", [32, 34, 66])
def test_bf16_scales_are_those_numbers_in_fp32(groups: int) -> None:
    """bf16 scales of many groups are read two at a time."""
    n, size = 70, 8
    scale = (torch.rand(n, groups) + 0.5).bfloat16()
    shifted = torch.cat([scale.new_zeros(1), scale.flatten()])[1:].view(n, groups)  # two bytes beyond a word
    packed = ops.pack_wna16(
        ops.pack_int32(torch.randint(-8, 8, (n, groups * size), dtype=torch.int8), 4), 4, groups * size
    )
    for rows in (1, 2, 13):
        x = torch.randn(rows, groups * size).bfloat16()
        expected = ops.wna16_gemm(x, packed, scale.float(), 4, n, size)
        assert torch.equal(ops.wna16_gemm(x, packed, scale, 4, n, size), expected)
        assert torch.equal(ops.wna16_gemm(x, packed, shifted, 4, n, size), expected)
