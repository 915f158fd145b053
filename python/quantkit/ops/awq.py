"""The search of AWQ: what each candidate vector of smoothing scales, and each clip ratio, costs a Linear's output.

The loss is that of the output over the calibration tokens, sum of (x dW^T)^2 = tr(dW g dW^T), from the Gram matrix
g = x^T x alone: no forward passes, whatever the number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._library import check_code_range, check_float, declare
from .quantize import _dequantize_reference, _quantize_int_reference
from .reduce import _absmax_reference, _minmax_reference
from .scale import _asymmetric_reference, _check_scale_dtype, _symmetric_reference


def _check(
    w: Tensor,
    g: Tensor,
    scales: Tensor,
    clip: Sequence[float],
    group_size: int,
    q_min: int,
    q_max: int,
    scale_dtype: torch.dtype,
) -> None:
    op = "awq_search"
    torch._check(w.dim() == 2, lambda: f"quantkit::{op}: w must be 2-D [rows, K], got {w.dim()}-D")
    check_float(op, "w", w)
    cols = w.shape[1]
    torch._check(
        tuple(g.shape) == (cols, cols) and g.dtype == torch.float32,
        lambda: f"quantkit::{op}: g must be torch.float32 [{cols}, {cols}], got {g.dtype} {list(g.shape)}",
    )
    torch._check(
        scales.dim() == 2 and scales.shape[1] == cols and scales.dtype == torch.float32,
        lambda: (
            f"quantkit::{op}: scales must be torch.float32 [candidates, {cols}], "
            f"got {scales.dtype} {list(scales.shape)}"
        ),
    )
    torch._check(all(0 < c <= 1 for c in clip), lambda: f"quantkit::{op}: clip ratios must lie in (0, 1]")
    torch._check(
        group_size == -1 or group_size > 0,
        lambda: f"quantkit::{op}: group_size must be positive, or -1 for the whole row, got {group_size}",
    )
    check_code_range(op, q_min, q_max)
    _check_scale_dtype(op, scale_dtype)


def _fake(
    w: Tensor,
    g: Tensor,
    scales: Tensor,
    clip: Sequence[float],
    group_size: int,
    q_min: int,
    q_max: int,
    symmetric: bool,
    divisor: float,
    scale_dtype: torch.dtype,
) -> Tensor:
    _check(w, g, scales, clip, group_size, q_min, q_max, scale_dtype)
    return w.new_empty((scales.shape[0], len(clip)), dtype=torch.float32)


def _reference(
    w: Tensor,
    g: Tensor,
    scales: Tensor,
    clip: Sequence[float],
    group_size: int,
    q_min: int,
    q_max: int,
    symmetric: bool,
    divisor: float,
    scale_dtype: torch.dtype,
) -> Tensor:
    _check(w, g, scales, clip, group_size, q_min, q_max, scale_dtype)
    wide, block = w.float(), [1, group_size]
    losses = w.new_zeros((scales.shape[0], len(clip)), dtype=torch.float32)
    if wide.numel() == 0:
        return losses
    for i, s in enumerate(scales):
        x = wide * s
        for j, ratio in enumerate(clip):
            zero_point = None
            if symmetric:
                scale = _symmetric_reference(_absmax_reference(x, block) * ratio, divisor, scale_dtype)
            else:
                low, high = _minmax_reference(x, block)
                scale, zero_point = _asymmetric_reference(low * ratio, high * ratio, q_min, q_max, scale_dtype)
            codes = _quantize_int_reference(x, scale, zero_point, block, q_min, q_max)
            error = (_dequantize_reference(codes, scale, zero_point, block, torch.float32) - x) / s
            # A NaN is the code of a number: it is in x and in no code.
            losses[i, j] = ((error @ g) * error).sum(dtype=torch.float64)
    return losses.nan_to_num(nan=math.inf, posinf=math.inf, neginf=math.inf)


_search = declare(
    "awq_search(Tensor w, Tensor g, Tensor scales, float[] clip, int group_size, int q_min, int q_max, "
    "bool symmetric, float divisor, ScalarType scale_dtype) -> Tensor",
    fake=_fake,
    reference=_reference,
)


def awq_search(
    w: Tensor,
    g: Tensor,
    scales: Tensor,
    *,
    group_size: int,
    q_min: int,
    q_max: int,
    symmetric: bool = True,
    divisor: float = 0.0,
    scale_dtype: torch.dtype = torch.float32,
    clip: Sequence[float] = (1.0,),
) -> Tensor:
    """Losses fp32 [S, C]: tr(dW g dW^T) with dW = Q(w * s) / s - w, for each of S smoothing vectors and C clip ratios.

    w [R, K] fp32, fp16 or bf16; g fp32 [K, K], symmetric, `gram_accumulate`'s; scales fp32 [S, K]. Q is the rounding
    of `rtn_int` in groups of `group_size` columns (-1: the row; the last group may be shorter) and back, with the
    extremes of each group times the clip ratio, in (0, 1]. On bf16 units the products of a large weight are bf16, with
    what matters most in fp32: errors are some 1e-5 of the loss, and below 1e-4. A loss that is not finite, as from NaN
    in w, a zero or NaN in a candidate, or overflow, is +inf: it never is the least. Numbers of a candidate below 2^-126
    may count as zero.
    """
    return _search(w, g, scales, list(clip), group_size, q_min, q_max, symmetric, divisor, scale_dtype)
