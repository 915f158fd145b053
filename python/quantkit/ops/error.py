"""How far a quantized matrix is from its source, in one pass over both: what the audit reports."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._library import check_float, declare, expand
from .quantize import check_quantized, check_scale


def _fake(x: Tensor, q: Tensor, scale: Tensor, zero_point: Tensor | None, block: Sequence[int]) -> Tensor:
    check_scale("quantization_error", x, scale, zero_point, block)
    check_float("quantization_error", "x", x)
    torch._check(
        x.shape == q.shape,
        lambda: f"quantkit::quantization_error: q {list(q.shape)} must have x's shape {list(x.shape)}",
    )
    check_quantized("quantization_error", "q", q)
    return x.new_empty((4,), dtype=torch.float64)


def _reference(x: Tensor, q: Tensor, scale: Tensor, zero_point: Tensor | None, block: Sequence[int]) -> Tensor:
    result = _fake(x, q, scale, zero_point, block).zero_()
    if x.numel() == 0:
        return result
    rows, cols = x.shape
    values = q.float()
    if zero_point is not None:
        values = values - expand(zero_point.float(), rows, cols, block)
    source = x.float()
    difference = (source - values * expand(scale, rows, cols, block)).double()
    source = source.double()
    return torch.stack((difference.square().sum(), source.square().sum(), difference.abs().max(), source.abs().max()))


_error = declare(
    "quantization_error(Tensor x, Tensor q, Tensor scale, Tensor? zero_point, int[] block) -> Tensor",
    fake=_fake,
    reference=_reference,
)


def quantization_error(x: Tensor, q: Tensor, scale: Tensor, zero_point: Tensor | None, block: Sequence[int]) -> Tensor:
    """fp64 [4]: sum of (x - x^)^2, sum of x^2, max |x - x^|, max |x|, where x^ = (q - zero_point) * scale in fp32.

    x [rows, cols] fp32, fp16 or bf16; q int8 or FP8 of the same shape. NaN propagates into every figure it touches.
    """
    return _error(x, q, scale, zero_point, list(block))
