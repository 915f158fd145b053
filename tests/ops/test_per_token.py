"""int8_quant_per_token and fp8_quant_per_token."""

from __future__ import annotations

import pytest
import torch

import quantkit.ops as ops

from .cpu_cases import FLOATS, FP8, KINDS, call, check, check_compiles, check_refused, matrices


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_like_the_reference(dtype: torch.dtype, kind: str) -> None:
    for x in matrices(dtype, kind):
        check("int8_quant_per_token", x, True)
        check("int8_quant_per_token", x, False)
        for fp8 in FP8:
            check("fp8_quant_per_token", x, fp8)


@pytest.mark.parametrize("shape", [(37,), (2, 3, 37), (2, 1, 3, 16), (0,), (0, 5), (2, 3, 0), (2, 0, 4)])
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    for symmetric in (True, False):
        check("int8_quant_per_token", x, symmetric)
    check("fp8_quant_per_token", x, torch.float8_e4m3fn)


def test_leading_strides() -> None:
    x = torch.randn(4, 6, 5, 40)
    for view in (x[:, ::2], x.transpose(0, 2), x[:, 1:5, :, 3:20], x[:1].expand(3, 6, 5, 40)):
        check("int8_quant_per_token", view, False)
        check("fp8_quant_per_token", view, torch.float8_e5m2)


def test_a_token_without_elements_counts_as_zero() -> None:
    _, scale, zero_point = ops.int8_quant_per_token(torch.zeros(2, 3, 0), symmetric=False)
    assert scale.shape == zero_point.shape == (2, 3, 1)
    assert scale.eq(ops.MIN_SCALE[torch.float32]).all() and zero_point.eq(-128).all()


def test_refuses() -> None:
    for op, how in (("int8_quant_per_token", True), ("fp8_quant_per_token", torch.float8_e4m3fn)):
        check_refused(op, "x must have at least one dimension", torch.tensor(1.0), how)
        check_refused(
            op, "x must be float32, float16 or bfloat16, got torch.int8", torch.zeros(3, dtype=torch.int8), how
        )
        with pytest.raises(RuntimeError, match="x must have its last dimension contiguous"):
            call(op, torch.ones(4, 6).t(), how)
    check_refused("fp8_quant_per_token", "dtype must be float8_e4m3fn or float8_e5m2", torch.ones(3), torch.int8)


def test_compiles() -> None:
    x = torch.randn(2, 3, 40, dtype=torch.float16)
    check_compiles("int8_quant_per_token", x, True)
    check_compiles("int8_quant_per_token", x, False)
    check_compiles("fp8_quant_per_token", x, torch.float8_e5m2)
