"""Scales found by search: the range of each block that quantizes it with the least error."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._library import check_code_range, check_float, check_matrix, declare, grid
from .reduce import _absmax_reference, _blocked, _minmax_reference
from .scale import _asymmetric_reference, _check_scale_dtype, _symmetric_reference


def _check_codes(op: str, q_min: int, q_max: int, symmetric: bool, divisor: float) -> None:
    check_code_range(op, q_min, q_max)
    torch._check(
        not symmetric or q_min <= 0 <= q_max,
        lambda: f"quantkit::{op}: [q_min, q_max] must hold 0, got [{q_min}, {q_max}]",
    )
    torch._check(
        not symmetric or (divisor > 0 and math.isfinite(divisor)),
        lambda: f"quantkit::{op}: divisor must be positive, got {divisor:g}",
    )


def _check_mse(
    x: Tensor,
    block: Sequence[int],
    importance: Tensor | None,
    q_min: int,
    q_max: int,
    symmetric: bool,
    divisor: float,
    scale_dtype: torch.dtype,
    norm: float,
    search_range: float,
    search_steps: int,
    signs: bool = False,
) -> None:
    op = "mse_scale"
    check_matrix(op, x, block)
    check_float(op, "x", x)
    torch._check(
        not signs or (symmetric and q_min < 0),
        lambda: f"quantkit::{op}: signs are for symmetric codes with a negative q_min",
    )
    _check_codes(op, q_min, q_max, symmetric, -q_min if signs else divisor)
    _check_scale_dtype(op, scale_dtype)
    torch._check(0 < norm <= 8, lambda: f"quantkit::{op}: norm must be above 0 and at most 8, got {norm:g}")
    torch._check(0 <= search_range < 1, lambda: f"quantkit::{op}: search_range must be in [0, 1), got {search_range:g}")
    torch._check(
        0 <= search_steps <= 1000, lambda: f"quantkit::{op}: search_steps must be 0 to 1000, got {search_steps}"
    )
    if importance is not None:
        torch._check(
            importance.dtype == torch.float32 and tuple(importance.shape) == (x.shape[1],),
            lambda: f"quantkit::{op}: importance must be float32 [{x.shape[1]}], one value a column of x",
        )


def _empty_scales(x: Tensor, block: Sequence[int], symmetric: bool) -> tuple[Tensor, Tensor]:
    shape = grid(x.shape[0], x.shape[1], block)
    return x.new_empty(shape, dtype=torch.float32), x.new_empty((0,) if symmetric else shape, dtype=torch.int8)


def _mse_fake(
    x: Tensor,
    block: Sequence[int],
    importance: Tensor | None,
    q_min: int,
    q_max: int,
    symmetric: bool,
    divisor: float,
    scale_dtype: torch.dtype,
    norm: float,
    search_range: float,
    search_steps: int,
    signs: bool = False,
) -> tuple[Tensor, Tensor]:
    _check_mse(
        x, block, importance, q_min, q_max, symmetric, divisor, scale_dtype, norm, search_range, search_steps, signs
    )
    return _empty_scales(x, block, symmetric)


def _mse_candidates(
    x: Tensor,
    block: Sequence[int],
    q_min: int,
    q_max: int,
    symmetric: bool,
    divisor: float,
    scale_dtype: torch.dtype,
    search_range: float,
    search_steps: int,
    signs: bool = False,
) -> tuple[Tensor, Tensor]:
    """Scales and zero points of all candidates, [candidates, grid rows, grid cols]."""
    op = "mse_scale"
    low, high = (None, _absmax_reference(x, block)) if symmetric else _minmax_reference(x, block)
    for extreme in (low, high):
        torch._check(extreme is None or bool(extreme.isfinite().all()), lambda: f"quantkit::{op}: x must be finite")
    left = [1.0 - search_range * i / search_steps if i else 1.0 for i in range(search_steps + 1)]
    part = torch.tensor(left, dtype=torch.float32, device=x.device).reshape(-1, 1, 1)
    if low is None:
        scale = _symmetric_reference(high * part, -q_min if signs else divisor, scale_dtype)
        if signs:
            scale = torch.cat((scale, -scale))
        return scale, torch.zeros_like(scale, dtype=torch.int8)
    return _asymmetric_reference(low.clamp(max=0) * part, high.clamp(min=0) * part, q_min, q_max, scale_dtype)


def _mse_reference(
    x: Tensor,
    block: Sequence[int],
    importance: Tensor | None,
    q_min: int,
    q_max: int,
    symmetric: bool,
    divisor: float,
    scale_dtype: torch.dtype,
    norm: float,
    search_range: float,
    search_steps: int,
    signs: bool = False,
) -> tuple[Tensor, Tensor]:
    _check_mse(
        x, block, importance, q_min, q_max, symmetric, divisor, scale_dtype, norm, search_range, search_steps, signs
    )
    scale, zero_point = _empty_scales(x, block, symmetric)
    if importance is not None:
        torch._check(
            bool((importance.isfinite() & (importance >= 0)).all()),
            lambda: "quantkit::mse_scale: importance must be finite and not negative",
        )
    if scale.numel() == 0 or x.numel() == 0:
        return scale, zero_point
    scales, zeros = _mse_candidates(
        x, block, q_min, q_max, symmetric, divisor, scale_dtype, search_range, search_steps, signs
    )
    errors = _mse_errors(x, block, importance, scales, zeros, q_min, q_max, norm)
    best = errors.nan_to_num(nan=float("inf")).argmin(0, keepdim=True)  # the first of equals
    return scales.gather(0, best)[0], zero_point if symmetric else zeros.gather(0, best)[0]


def _mse_errors(
    x: Tensor,
    block: Sequence[int],
    importance: Tensor | None,
    scales: Tensor,
    zeros: Tensor,
    q_min: int,
    q_max: int,
    norm: float,
) -> Tensor:
    """fp64 error of every candidate, [candidates, grid rows, grid cols]; codes are made in fp32."""
    values = _blocked(x, block, 0.0)
    weights = None if importance is None else _blocked(importance.expand(x.shape), block, 0.0).double()
    unit = values.double().abs().amax(-1, keepdim=True).clamp(min=2.0**-126)
    errors = []
    for scale, zero in zip(scales.unsqueeze(-1), zeros.float().unsqueeze(-1), strict=True):
        codes = torch.round(values * (1.0 / scale)).clamp(q_min - zero, q_max - zero)
        error = ((codes.double() * scale.double() - values.double()) / unit).abs() ** norm
        errors.append((error if weights is None else error * weights).sum(-1))
    return torch.stack(errors)


_mse = declare(
    "mse_scale(Tensor x, int[] block, Tensor? importance, int q_min, int q_max, bool symmetric, float divisor, "
    "ScalarType scale_dtype, float norm, float search_range, int search_steps, "
    "bool signs=False) -> (Tensor, Tensor)",
    fake=_mse_fake,
    reference=_mse_reference,
)


def mse_scale(
    x: Tensor,
    block: Sequence[int],
    *,
    q_min: int,
    q_max: int,
    symmetric: bool = True,
    divisor: float = 0.0,
    scale_dtype: torch.dtype = torch.float32,
    importance: Tensor | None = None,
    norm: float = 2.4,
    search_range: float = 0.2,
    search_steps: int = 20,
    signs: bool = False,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each block whose range, shrunk to 1 - search_range * i / search_steps, errs least.

    x [rows, cols] fp32, fp16 or bf16 -> scale fp32 of `block`'s grid, rounded to `scale_dtype`; int8 zero point of
    that grid, empty if symmetric. The error is the sum of importance * |dequantized - x|^norm over the block, with
    `importance` fp32 [cols], or none; i runs from 0 to `search_steps` and the first of equals wins. The defaults of
    the search are those of llm-compressor's MSE observer, without its early stop. `signs` (symmetric codes): the whole
    range is max|x| = -q_min steps instead of `divisor`, and after all positive scales the same ones negated are tried,
    so that the code without a counterpart may stand for the largest value of either sign. Sums are fp32 within 512
    elements and fp64 beyond: candidates whose errors are within about 1e-5 of each other count as equal.
    RuntimeError: x not finite; `signs` of asymmetric codes; importance negative or not finite; norm outside (0, 8];
    search_range outside [0, 1).
    """
    return _mse(
        x,
        list(block),
        importance,
        q_min,
        q_max,
        symmetric,
        divisor,
        scale_dtype,
        norm,
        search_range,
        search_steps,
        signs,
    )


def _check_percentile(
    x: Tensor,
    block: Sequence[int],
    percentile: float,
    q_min: int,
    q_max: int,
    symmetric: bool,
    divisor: float,
    scale_dtype: torch.dtype,
) -> None:
    op = "percentile_scale"
    check_matrix(op, x, block)
    check_float(op, "x", x)
    _check_codes(op, q_min, q_max, symmetric, divisor)
    _check_scale_dtype(op, scale_dtype)
    torch._check(0 < percentile <= 100, lambda: f"quantkit::{op}: percentile must be in (0, 100], got {percentile:g}")


def _percentile_fake(
    x: Tensor,
    block: Sequence[int],
    percentile: float,
    q_min: int,
    q_max: int,
    symmetric: bool,
    divisor: float,
    scale_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    _check_percentile(x, block, percentile, q_min, q_max, symmetric, divisor, scale_dtype)
    return _empty_scales(x, block, symmetric)


def _percentile_reference(
    x: Tensor,
    block: Sequence[int],
    percentile: float,
    q_min: int,
    q_max: int,
    symmetric: bool,
    divisor: float,
    scale_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    op = "percentile_scale"
    _check_percentile(x, block, percentile, q_min, q_max, symmetric, divisor, scale_dtype)
    scale, zero_point = _empty_scales(x, block, symmetric)
    if scale.numel() == 0 or x.numel() == 0:
        return scale, zero_point
    torch._check(bool(_absmax_reference(x, block).isfinite().all()), lambda: f"quantkit::{op}: x must be finite")
    # Elements of a ragged block are fewer; what fills it is sorted to the end.
    sizes = _blocked(torch.ones(x.shape, device=x.device), block, 0.0).sum(-1, dtype=torch.float64)
    rank = torch.ceil(sizes * (percentile / 100)).clamp(min=1).to(torch.int64).unsqueeze(-1) - 1

    def ranked(values: Tensor) -> Tensor:
        return _blocked(values, block, float("inf")).sort(-1).values.gather(-1, rank).squeeze(-1)

    if symmetric:
        return _symmetric_reference(ranked(x.abs()), divisor, scale_dtype), zero_point
    return _asymmetric_reference(-ranked(-x), ranked(x), q_min, q_max, scale_dtype)


_percentile = declare(
    "percentile_scale(Tensor x, int[] block, float percentile, int q_min, int q_max, bool symmetric, float divisor, "
    "ScalarType scale_dtype) -> (Tensor, Tensor)",
    fake=_percentile_fake,
    reference=_percentile_reference,
)


def percentile_scale(
    x: Tensor,
    block: Sequence[int],
    *,
    percentile: float = 99.99,
    q_min: int,
    q_max: int,
    symmetric: bool = True,
    divisor: float = 0.0,
    scale_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each block whose range holds `percentile` percent of its elements.

    x [rows, cols] fp32, fp16 or bf16 -> scale fp32 of `block`'s grid, rounded to `scale_dtype`; int8 zero point of
    that grid, empty if symmetric. Of a block's n magnitudes (symmetric) or of its values from either end, the range
    ends at the ceil(n * percentile / 100)-th, exactly: no interpolation, so of few elements nothing is cut.
    RuntimeError: x not finite; percentile outside (0, 100]. The CUDA kernel does not wait for the device: of a block
    that is not finite its scale is NaN and its zero point 0.
    """
    return _percentile(x, list(block), percentile, q_min, q_max, symmetric, divisor, scale_dtype)
