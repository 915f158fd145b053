"""quantize_int, quantize_fp8 and dequantize."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import quantkit.ops as ops

from .cpu_cases import (
    BLOCKS,
    FLOATS,
    FP8,
    KINDS,
    call,
    check,
    check_compiles,
    check_refused,
    matrices,
    reference,
)


def scales(x: Tensor, block: list[int], divisor: float) -> Tensor:
    """Somewhat too small, so that some values saturate; finite even where x is not."""
    return 0.7 * reference("symmetric_scale", reference("absmax", x, block).nan_to_num(1.0), divisor, torch.float32)


def zero_points(scale: Tensor) -> Tensor:
    return (torch.arange(scale.numel()).reshape(scale.shape) * 37 % 256 - 128).to(torch.int8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_int_like_the_reference(dtype: torch.dtype, kind: str) -> None:
    for x in matrices(dtype, kind):
        for block in BLOCKS:
            scale = scales(x, block, 127.0)
            check("quantize_int", x, scale, None, block, -127, 127)
            check("quantize_int", x, scale, zero_points(scale), block, -128, 127)
            check("quantize_int", x, scale, zero_points(scale), block, -8, 7)  # zero points beyond the range as well


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_fp8_like_the_reference(dtype: torch.dtype, kind: str) -> None:
    for x in matrices(dtype, kind):
        for block in BLOCKS:
            for fp8 in FP8:
                check("quantize_fp8", x, scales(x, block, ops.FP8_MAX[fp8]), block, fp8)


@pytest.mark.parametrize("dtype", FLOATS)
def test_dequantize_like_the_reference(dtype: torch.dtype) -> None:
    for x in matrices(torch.float32, "special"):
        for block in BLOCKS:
            scale = scales(x, block, 127.0)
            codes = reference("quantize_int", x, scale, None, block, -128, 127)
            check("dequantize", codes, scale, None, block, dtype)
            check("dequantize", codes, scale, zero_points(scale), block, dtype)
            for fp8 in FP8:
                check("dequantize", reference("quantize_fp8", x, scale, block, fp8), scale, None, block, dtype)


@pytest.mark.parametrize("scale", [1.0, 0.013, 3.7, 2.0**-20])
@pytest.mark.parametrize("fp8", FP8)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fp8_of_every_16_bit_pattern(dtype: torch.dtype, fp8: torch.dtype, scale: float) -> None:
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).reshape(64, 1024)
    args = (x, torch.full((1, 1), scale), [-1, -1], fp8)
    assert torch.equal(
        call("quantize_fp8", *args).view(torch.uint8), reference("quantize_fp8", *args).view(torch.uint8)
    )


@pytest.mark.parametrize("fp8", FP8)
def test_fp8_of_every_tie_in_fp32(fp8: torch.dtype) -> None:
    """Between neighbouring codes: the middle, and the next fp32 number on either side of it."""
    codes = torch.arange(256, dtype=torch.uint8).view(fp8).float()
    values = codes[codes.isfinite()].unique()
    middle = (values[1:] + values[:-1]) / 2
    around = [middle, torch.nextafter(middle, middle + 1), torch.nextafter(middle, middle - 1)]
    x = torch.stack([*around, values[1:]])
    assert torch.equal(
        call("quantize_fp8", x, torch.ones(1, 1), [-1, -1], fp8).view(torch.uint8), x.to(fp8).view(torch.uint8)
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("fp8", FP8)
def test_every_fp8_code_decodes(fp8: torch.dtype, dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(fp8).reshape(4, 64)
    for scale in (1.0, 0.37, 1e-3):
        check("dequantize", codes, torch.full((1, 1), scale), None, [-1, -1], dtype)


def test_int_rounds_ties_to_even_and_saturates() -> None:
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 127.5, 1e30, -1e30, float("inf"), float("nan"), -0.0]])
    codes = ops.quantize_int(x, torch.ones(1, 1), None, [1, -1], -127, 127)
    assert codes.tolist() == [[0, 2, 2, 0, -2, -2, 126, 127, 127, -127, 127, 0, 0]]


def test_fp8_saturates_and_keeps_nan() -> None:
    x = torch.tensor([[1e30, -float("inf"), float("nan"), -0.0]])
    for fp8, limit in ops.FP8_MAX.items():
        q = ops.quantize_fp8(x, torch.ones(1, 1), [1, -1], fp8).float()
        assert q[0, 0] == limit and q[0, 1] == -limit and q[0, 2].isnan() and q[0, 3].signbit()


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty(shape: tuple[int, int], block: list[int]) -> None:
    x = torch.zeros(shape)
    scale = reference("absmax", x, block)
    check("quantize_int", x, scale, None, block, -8, 7)
    check("quantize_fp8", x, scale, block, torch.float8_e5m2)
    check("dequantize", x.to(torch.int8), scale, None, block, torch.float16)


rows_of_floats = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=70)


@settings(deadline=None, max_examples=100)
@given(values=rows_of_floats, group=st.integers(1, 40), bits=st.sampled_from([4, 8]))
def test_symmetric_error_is_at_most_half_a_step(values: list[float], group: int, bits: int) -> None:
    x, half = torch.tensor([values]), 1 << (bits - 1)
    scale = ops.symmetric_scale(ops.absmax(x, [1, group]), float(half - 1))
    codes = ops.quantize_int(x, scale, None, [1, group], -half, half - 1)
    error = (x.double() - ops.dequantize(codes, scale, None, [1, group]).double()).abs()
    step = scale.double().repeat_interleave(group, 1)[:, : x.shape[1]]
    assert (error <= step * 0.5 + 4 * torch.finfo(torch.float32).eps * x.double().abs()).all()


@settings(deadline=None, max_examples=100)
@given(values=rows_of_floats, group=st.integers(1, 40), bits=st.sampled_from([4, 8]))
def test_asymmetric_error_is_at_most_a_step(values: list[float], group: int, bits: int) -> None:
    """Half a step from rounding x, and another half where rounding the zero point cut off an end of the range."""
    x, half = torch.tensor([values]), 1 << (bits - 1)
    scale, zero_point = ops.asymmetric_scale(*ops.minmax(x, [1, group]), -half, half - 1)
    codes = ops.quantize_int(x, scale, zero_point, [1, group], -half, half - 1)
    error = (x.double() - ops.dequantize(codes, scale, zero_point, [1, group]).double()).abs()
    step = scale.double().repeat_interleave(group, 1)[:, : x.shape[1]]
    assert (error <= step + 4 * torch.finfo(torch.float32).eps * x.double().abs()).all()


def test_refuses() -> None:
    x, scale, block = torch.ones(4, 6), torch.ones(4, 1), [1, -1]
    shape = r"scale must be float32 \[4, 2\] for x \[4, 6\] and block \[1, 3\], got torch.float32 \[4, 1\]"
    check_refused("quantize_int", shape, x, scale, None, [1, 3], -8, 7)
    check_refused("quantize_int", "got torch.float64", x, scale.double(), None, block, -8, 7)
    check_refused("quantize_int", r"zero_point must be int8 with scale's shape \[4, 1\]", x, scale, scale, block, -8, 7)
    check_refused("quantize_int", r"must fit int8, got \[-8, 300\]", x, scale, None, block, -8, 300)
    check_refused("quantize_int", "x must be float32, .* got torch.int32", x.int(), scale, None, block, -8, 7)
    check_refused("quantize_fp8", "dtype must be float8_e4m3fn or float8_e5m2, got", x, scale, block, torch.int8)
    check_refused("dequantize", "q must be int8, .* got torch.float32", x, scale, None, block, torch.float32)
    codes = x.to(torch.int8)
    check_refused("dequantize", "dtype must be float32, .* got torch.int8", codes, scale, None, block, torch.int8)
    for op, args in (("quantize_int", (None, block, -8, 7)), ("quantize_fp8", (block, torch.float8_e4m3fn))):
        with pytest.raises(RuntimeError, match="x must have its last dimension contiguous"):
            call(op, torch.ones(6, 4).t(), scale, *args)
        with pytest.raises(RuntimeError, match=r"scale must be contiguous, got strides \[2, 1\]"):
            call(op, x, torch.ones(4, 2)[:, :1], *args)


def test_compiles() -> None:
    x, scale = torch.randn(5, 70, dtype=torch.bfloat16), torch.rand(5, 3)
    zero_point = zero_points(scale)
    check_compiles("quantize_int", x, scale, zero_point, [1, 32], -8, 7)
    check_compiles("quantize_fp8", x, scale, [1, 32], torch.float8_e4m3fn)
    check_compiles("dequantize", torch.ones(5, 70, dtype=torch.int8), scale, zero_point, [1, 32], torch.bfloat16)
