"""symmetric_scale and asymmetric_scale."""

from __future__ import annotations

import pytest
import torch

import quantkit.ops as ops

from .cpu_cases import FLOATS, SPECIAL, check, check_compiles, check_refused


def extremes(n: int) -> torch.Tensor:
    """Many magnitudes, then special values; n of them."""
    generator = torch.Generator().manual_seed(n)
    wide = torch.randn(n, generator=generator) * torch.exp2(torch.randint(-140, 120, (n,), generator=generator))
    special = torch.tensor(SPECIAL)
    wide[: len(special)] = special[:n]
    return wide


@pytest.mark.parametrize("scale_dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1,), (15,), (16,), (3, 17), (40, 50), (0, 4)])
def test_like_the_reference(shape: tuple[int, ...], scale_dtype: torch.dtype) -> None:
    amax = extremes(torch.Size(shape).numel()).abs().reshape(shape)
    for divisor in (7.5, 127.0, 448.0, 57344.0):
        check("symmetric_scale", amax, divisor, scale_dtype)
    low, high = -amax, amax.flatten().flip(0).reshape(shape)
    for q_min, q_max in ((-8, 7), (-128, 127), (0, 15)):
        check("asymmetric_scale", low, high, q_min, q_max, scale_dtype)
        check("asymmetric_scale", high, high, q_min, q_max, scale_dtype)  # above zero: the range still reaches it
        check("asymmetric_scale", low, low, q_min, q_max, scale_dtype)


@pytest.mark.parametrize("scale_dtype", FLOATS)
def test_rounded_to_the_dtype_that_will_hold_it(scale_dtype: torch.dtype) -> None:
    scale = ops.symmetric_scale(torch.rand(1000) * 10, 7.5, scale_dtype)
    assert torch.equal(scale, scale.to(scale_dtype).float())


def test_zero_has_a_finite_inverse() -> None:
    for dtype, least in ops.MIN_SCALE.items():
        scale = ops.symmetric_scale(torch.zeros(3), 127.0, dtype)
        assert scale.eq(least).all()
        assert (1 / scale).isfinite().all()


def test_refuses() -> None:
    x = torch.ones(3)
    check_refused("symmetric_scale", "amax must be float32, got torch.float16", x.half(), 7.5, torch.float32)
    check_refused("symmetric_scale", "scale_dtype must be float32, .* got torch.int8", x, 7.5, torch.int8)
    check_refused("asymmetric_scale", "x_max must be float32", x, x.double(), -8, 7, torch.float32)
    check_refused("asymmetric_scale", r"x_max \[2\] must have x_min's shape \[3\]", x, x[:2], -8, 7, torch.float32)
    check_refused("asymmetric_scale", r"must fit int8, got \[0, 255\]", x, x, 0, 255, torch.float32)
    with pytest.raises(RuntimeError, match=r"quantkit::symmetric_scale: amax must be contiguous, got strides \[2\]"):
        torch.ops.quantkit.symmetric_scale(torch.ones(6)[::2], 7.5, torch.float32)


def test_compiles() -> None:
    check_compiles("symmetric_scale", torch.rand(4, 3), 7.5, torch.bfloat16)
    check_compiles("asymmetric_scale", -torch.rand(4, 3), torch.rand(4, 3), -8, 7, torch.float16)
