"""Scales and zero points from reductions. All arithmetic is fp32, whatever dtype the scale is stored in.

A reader that holds scales in 16 bit must see the very value the codes were made with, so the scale is
rounded to `scale_dtype` here, before any code is computed, and given back as fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import check_code_range, declare

# The smallest scale: an all-zero block gets it, so that 1/scale stays finite. fp16 cannot hold less than 2^-24.
MIN_SCALE = {torch.float32: 2.0**-100, torch.bfloat16: 2.0**-100, torch.float16: 2.0**-24}


def _check_scale_dtype(op: str, scale_dtype: torch.dtype) -> None:
    torch._check(
        scale_dtype in MIN_SCALE,
        lambda: f"quantkit::{op}: scale_dtype must be float32, bfloat16 or float16, got {scale_dtype}",
    )


def _check_extremes(op: str, name: str, x: Tensor) -> None:
    torch._check(x.dtype == torch.float32, lambda: f"quantkit::{op}: {name} must be float32, got {x.dtype}")


def _check_asymmetric(x_min: Tensor, x_max: Tensor, q_min: int, q_max: int, scale_dtype: torch.dtype) -> None:
    op = "asymmetric_scale"
    _check_extremes(op, "x_min", x_min)
    _check_extremes(op, "x_max", x_max)
    torch._check(
        x_min.shape == x_max.shape,
        lambda: f"quantkit::{op}: x_max {list(x_max.shape)} must have x_min's shape {list(x_min.shape)}",
    )
    check_code_range(op, q_min, q_max)
    _check_scale_dtype(op, scale_dtype)


def _round_scale(scale: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """Rounded to `scale_dtype`, at least its MIN_SCALE; NaN stays NaN."""
    return scale.to(scale_dtype).float().clamp(min=MIN_SCALE[scale_dtype])


def _symmetric_fake(amax: Tensor, divisor: float, scale_dtype: torch.dtype) -> Tensor:
    _check_extremes("symmetric_scale", "amax", amax)
    _check_scale_dtype("symmetric_scale", scale_dtype)
    return torch.empty_like(amax, dtype=torch.float32, memory_format=torch.contiguous_format)


def _symmetric_reference(amax: Tensor, divisor: float, scale_dtype: torch.dtype) -> Tensor:
    _check_extremes("symmetric_scale", "amax", amax)
    _check_scale_dtype("symmetric_scale", scale_dtype)
    return _round_scale(amax.contiguous() / divisor, scale_dtype)


def _asymmetric_fake(
    x_min: Tensor, x_max: Tensor, q_min: int, q_max: int, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    _check_asymmetric(x_min, x_max, q_min, q_max, scale_dtype)
    scale = torch.empty_like(x_min, dtype=torch.float32, memory_format=torch.contiguous_format)
    return scale, torch.empty_like(scale, dtype=torch.int8)


def _asymmetric_reference(
    x_min: Tensor, x_max: Tensor, q_min: int, q_max: int, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    _check_asymmetric(x_min, x_max, q_min, q_max, scale_dtype)
    low, high = x_min.contiguous().clamp(max=0.0), x_max.contiguous().clamp(min=0.0)
    scale = _round_scale((high - low) / (q_max - q_min), scale_dtype)
    zero_point = (q_min - torch.round(low / scale)).clamp(q_min, q_max)
    return scale, zero_point.nan_to_num(nan=0.0).to(torch.int8)


_symmetric = declare(
    "symmetric_scale(Tensor amax, float divisor, ScalarType scale_dtype) -> Tensor",
    fake=_symmetric_fake,
    reference=_symmetric_reference,
)
_asymmetric = declare(
    "asymmetric_scale(Tensor x_min, Tensor x_max, int q_min, int q_max, ScalarType scale_dtype) -> (Tensor, Tensor)",
    fake=_asymmetric_fake,
    reference=_asymmetric_reference,
)


def symmetric_scale(amax: Tensor, divisor: float, scale_dtype: torch.dtype = torch.float32) -> Tensor:
    """scale = max(amax / divisor, MIN_SCALE), rounded to `scale_dtype`. amax fp32 of any shape -> fp32 of that shape.

    `divisor` is the code that amax becomes: 127 for int8, 448 for FP8 e4m3, 57344 for e5m2.
    """
    return _symmetric(amax, divisor, scale_dtype)


def asymmetric_scale(
    x_min: Tensor, x_max: Tensor, q_min: int, q_max: int, scale_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Scale and int8 zero point that map [min(x_min, 0), max(x_max, 0)] onto [q_min, q_max]; x = (q - zp) * scale."""
    return _asymmetric(x_min, x_max, q_min, q_max, scale_dtype)
