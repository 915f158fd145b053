"""Histograms of activations that any split of the data builds alike, and scales found over them.

Bins are [t, t + 1) * span / 4096 of the magnitude, mirrored below zero: bin 4096 + t of 8192 above, 4095 - t below;
zero is in bin 4096. When the span doubles, bins 2t and 2t + 1 of either side become bin t: where a value is counted
depends on the final span alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._library import check_float, declare

HISTOGRAM_BINS = 8192
_HALF = HISTOGRAM_BINS // 2
_LEAST, _MOST = 2.0**-100, 2.0**127  # spans whose reciprocal, times the bins, is an fp32 number


def _check_histogram(op: str, counts: Tensor, span: Tensor) -> None:
    torch._check(
        counts.dtype == torch.int64 and tuple(counts.shape) == (HISTOGRAM_BINS,),
        lambda: (
            f"quantkit::{op}: counts must be torch.int64 [{HISTOGRAM_BINS}], got {counts.dtype} {list(counts.shape)}"
        ),
    )
    torch._check(
        span.dtype == torch.float32 and tuple(span.shape) == (1,),
        lambda: f"quantkit::{op}: span must be torch.float32 [1], got {span.dtype} {list(span.shape)}",
    )


def _check_accumulate(x: Tensor, mask: Tensor | None, counts: Tensor, span: Tensor) -> None:
    op = "histogram_accumulate"
    torch._check(x.dim() == 2, lambda: f"quantkit::{op}: x must be 2-D [tokens, columns], got {x.dim()}-D")
    check_float(op, "x", x)
    _check_histogram(op, counts, span)
    if mask is not None:
        torch._check(
            mask.dtype == torch.bool and tuple(mask.shape) == (x.shape[0],),
            lambda: f"quantkit::{op}: mask must be torch.bool [{x.shape[0]}], one value a row of x",
        )


def _accumulate_fake(x: Tensor, mask: Tensor | None, counts: Tensor, span: Tensor) -> None:
    _check_accumulate(x, mask, counts, span)


def _merge(counts: Tensor, doublings: int) -> Tensor:
    """Counts over a span 2^doublings times as wide."""
    if doublings <= 0:
        return counts
    t = torch.arange(_HALF, device=counts.device) >> min(doublings, 62)
    places = torch.cat((_HALF - 1 - t.flip(0), _HALF + t))
    return torch.zeros_like(counts).index_add_(0, places, counts)


def _doublings(span: float, wider: float) -> int:
    return 0 if span == 0 else math.frexp(wider)[1] - math.frexp(span)[1]


def _accumulate_reference(x: Tensor, mask: Tensor | None, counts: Tensor, span: Tensor) -> None:
    _check_accumulate(x, mask, counts, span)
    op = "histogram_accumulate"
    values = (x if mask is None else x[mask]).float()
    if values.numel() == 0:
        return
    most = float(values.abs().amax())
    torch._check(most < _MOST, lambda: f"quantkit::{op}: x must be finite and below 2^127")
    old = float(span)
    new = old
    if most > 0 and most >= old:
        new = max(_LEAST, 2.0 ** math.frexp(most)[1])
        counts.copy_(_merge(counts, _doublings(old, new)))
        span.fill_(new)
    size = (values.abs() * (_HALF / new)).to(torch.int64) if new else torch.zeros_like(values, dtype=torch.int64)
    places = torch.where(values < 0, _HALF - 1 - size, _HALF + size)
    counts += torch.bincount(places.flatten(), minlength=HISTOGRAM_BINS)


_accumulate = declare(
    "histogram_accumulate(Tensor x, Tensor? mask, Tensor(a!) counts, Tensor(b!) span) -> ()",
    fake=_accumulate_fake,
    reference=_accumulate_reference,
    kernels=("CPU", "CUDA"),
)


def histogram_accumulate(x: Tensor, counts: Tensor, span: Tensor, *, mask: Tensor | None = None) -> None:
    """Count the values of x [tokens, columns] (fp32, fp16, bf16) in place; rows with a False `mask` do not count.

    counts int64 [8192] over [-span, span]; span fp32 [1], a power of two above every magnitude seen, 0 while there
    was none but zero. Any order or split of the data gives the same counts.
    RuntimeError: a value that counts is NaN, infinite, or at least 2^127 in magnitude.
    """
    _accumulate(x, mask, counts, span)


def merge_histograms(counts: Tensor, span: Tensor, other_counts: Tensor, other_span: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and span of two histograms together, as if one had seen all values. The arguments stay as they are."""
    for c, s in ((counts, span), (other_counts, other_span)):
        _check_histogram("merge_histograms", c, s)
    a, b = float(span), float(other_span)
    wide = max(a, b)
    merged = _merge(counts, _doublings(a, wide)) + _merge(other_counts, _doublings(b, wide))
    return merged, torch.maximum(span, other_span)
