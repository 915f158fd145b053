"""One scale for all values of a histogram, by several measures of what a good one is.

The work is a few million scalar operations once for each input of a layer: plain C++ on the CPU, fp64 on CUDA.
"""

from __future__ import annotations

import difflib
import math

import torch
from torch import Tensor

from ._library import check_code_range, declare
from .histogram import _HALF, HISTOGRAM_BINS, _check_histogram
from .scale import MIN_SCALE

METHODS = ("percentile", "mse", "kl", "eq", "admm")
_DEFAULTS = {"percentile": 99.99, "mse": 2.0, "kl": 0.0, "eq": 0.0, "admm": 0.0}
_OP = "histogram_scale"
_STEPS = 256  # ranges that mse and eq try: amax * i / 256
_KL_BINS = 2048


def _check(
    counts: Tensor,
    span: Tensor,
    range: Tensor,
    method: int,
    parameter: float,
    q_min: int,
    q_max: int,
    symmetric: bool,
    divisor: float,
) -> None:
    _check_histogram(_OP, counts, span)
    torch._check(
        range.dtype == torch.float32 and tuple(range.shape) == (2,),
        lambda: f"quantkit::{_OP}: range must be torch.float32 [2], got {range.dtype} {list(range.shape)}",
    )
    torch._check(0 <= method < len(METHODS), lambda: f"quantkit::{_OP}: method must be 0 to 4, got {method}")
    check_code_range(_OP, q_min, q_max)
    torch._check(
        not symmetric or (q_min < 0 < q_max and divisor > 0),
        lambda: f"quantkit::{_OP}: a symmetric scale needs q_min < 0 < q_max and a positive divisor",
    )
    name = METHODS[method]
    torch._check(
        name != "percentile" or 0 < parameter <= 100,
        lambda: f"quantkit::{_OP}: percentile must be in (0, 100], got {parameter:g}",
    )
    torch._check(
        name != "mse" or 0 < parameter <= 8,
        lambda: f"quantkit::{_OP}: the norm of mse must be above 0 and at most 8, got {parameter:g}",
    )


def _fake(
    counts: Tensor,
    span: Tensor,
    range: Tensor,
    method: int,
    parameter: float,
    q_min: int,
    q_max: int,
    symmetric: bool,
    divisor: float,
) -> tuple[Tensor, Tensor]:
    _check(counts, span, range, method, parameter, q_min, q_max, symmetric, divisor)
    return range.new_empty((1, 1)), range.new_empty((0,) if symmetric else (1, 1), dtype=torch.int8)


class _Quantizer:
    """Scales of ranges [low, high], and what they make of values."""

    def __init__(self, q_min: int, q_max: int, symmetric: bool, divisor: float) -> None:
        self.q_min, self.q_max, self.symmetric, self.divisor = q_min, q_max, symmetric, divisor

    def scale(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """fp64 scale (an fp32 number) and zero point."""
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        if self.symmetric:
            scale = torch.maximum(high, -low) / self.divisor
            scale = scale.float().clamp(min=MIN_SCALE[torch.float32]).double()
            return scale, torch.zeros_like(scale)
        scale = ((high - low) / (self.q_max - self.q_min)).float().clamp(min=MIN_SCALE[torch.float32]).double()
        return scale, (self.q_min - torch.round(low / scale)).clamp(self.q_min, self.q_max)

    def codes(self, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Relative to the zero point."""
        return torch.minimum(torch.maximum(torch.round(x / scale), self.q_min - zero), self.q_max - zero)


def _percentile(counts: Tensor, edges: Tensor, percentile: float, symmetric: bool) -> tuple[Tensor, Tensor]:
    wanted = counts.sum().double() * (percentile / 100)

    def edge(c: Tensor, upper: Tensor) -> Tensor:  # of the first bin that reaches the wanted count
        reached = (c.cumsum(0).double() >= wanted).to(torch.int8).argmax()
        return upper[reached]

    if symmetric:
        high = edge(counts[_HALF:] + counts[:_HALF].flip(0), edges[_HALF + 1 :])
        return -high, high
    return -edge(counts.flip(0), -edges[:-1].flip(0)), edge(counts, edges[1:])


def _kl(counts: Tensor, span: float, amax: float, levels: int) -> float:
    """The threshold that keeps the distribution of magnitudes closest to what `levels` codes make of it (Migacz,
    8-bit Inference with TensorRT, 2017)."""
    magnitudes = (counts[_HALF:] + counts[:_HALF].flip(0)).reshape(_KL_BINS, -1).sum(1).double()
    width = span / _KL_BINS
    end = min(_KL_BINS, int(amax / width) + 1)
    bins = torch.arange(end)
    filled = magnitudes[:end] > 0
    total = magnitudes.sum()
    found: list[tuple[float, float]] = []  # divergence, threshold
    for i in _widths(levels, end):
        p = magnitudes[:i].clone()
        p[-1] += magnitudes[i:].sum()
        group = bins[:i] * levels // i
        sums = torch.zeros(levels, dtype=torch.float64).index_add_(0, group, magnitudes[:i])
        alike = torch.zeros(levels, dtype=torch.float64).index_add_(0, group, filled[:i].double())
        q = torch.where(filled[:i], (sums / alike.clamp(min=1))[group], 0.0)
        kept = q.sum()
        if kept == 0:
            continue
        # Where q has nothing, the clipped mass fell on an empty bin: counted as if q had one value there.
        q = (q / kept).clamp(min=1.0 / float(total) / 2)
        p = p / total
        divergence = float(torch.where(p > 0, p * (p.clamp(min=1e-300) / q).log(), 0.0).sum())
        found.append((divergence, min(amax, i * width)))
    least = min((d for d, _ in found), default=0.0)
    return max((t for d, t in found if d <= least + 1e-9), default=amax)  # the widest of equals, but for roundings


def _widths(levels: int, end: int) -> list[int]:
    """How many bins are kept, of `end`: no fewer than there are codes."""
    return list(range(min(levels, end), end + 1))


def _reference(
    counts: Tensor,
    span: Tensor,
    range: Tensor,
    method: int,
    parameter: float,
    q_min: int,
    q_max: int,
    symmetric: bool,
    divisor: float,
) -> tuple[Tensor, Tensor]:
    _check(counts, span, range, method, parameter, q_min, q_max, symmetric, divisor)
    torch._check(bool(range.isfinite().all()), lambda: f"quantkit::{_OP}: range must be finite")
    torch._check(bool((counts >= 0).all()), lambda: f"quantkit::{_OP}: counts must not be negative")
    how, name, wide = _Quantizer(q_min, q_max, symmetric, divisor), METHODS[method], float(span)
    low, high = range.double()[0].clamp(max=0.0), range.double()[1].clamp(min=0.0)
    amax = torch.maximum(high, -low)
    scale, zero = how.scale(low, high)
    if wide > 0 and float(amax) > 0 and int(counts.sum()) > 0:
        edges = torch.linspace(-wide, wide, HISTOGRAM_BINS + 1, dtype=torch.float64, device=counts.device)
        if name in ("percentile", "kl"):
            if name == "percentile":
                a, b = _percentile(counts, edges, parameter, symmetric)
            else:
                b = torch.tensor(_kl(counts.cpu(), wide, float(amax), q_max - q_min + 1 >> 1), dtype=torch.float64)
                a = -b
            scale, zero = how.scale(torch.maximum(low, a), torch.minimum(high, b))
        else:
            some = counts > 0
            values = ((edges[:-1] + edges[1:]) / 2)[some].clamp(low, high)
            scale, zero = _search(how, name, parameter, counts[some].double(), values, low, high)
    result = scale.float().reshape(1, 1)
    return result, range.new_empty((0,), dtype=torch.int8) if symmetric else zero.to(torch.int8).reshape(1, 1)


def _search(
    how: _Quantizer, name: str, norm: float, weights: Tensor, values: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    unit = 2.0 ** math.frexp(float(torch.maximum(high, -low)))[1]  # no power of an error overflows or vanishes
    if name == "admm":
        scale, zero = how.scale(low, high)
        for _ in [None] * 200:
            codes = how.codes(values, scale, zero)
            fitted = (weights * codes * (values / unit)).sum() / (weights * codes * codes).sum() * unit
            fitted = fitted.float().clamp(min=MIN_SCALE[torch.float32]).double()
            if not bool(fitted.isfinite()) or bool(fitted == scale):
                break
            scale = fitted
        return scale, zero
    part = torch.arange(_STEPS, 0, -1, dtype=torch.float64, device=values.device).unsqueeze(1) / _STEPS
    scales, zeros = how.scale(low * part, high * part)
    made = how.codes(values, scales, zeros) * scales / unit
    x = values / unit
    if name == "mse":
        loss = (weights * (made - x).abs() ** norm).sum(1)
    else:  # the square of the cosine between them, up to |x|, which all share
        squares = (weights * made * made).sum(1)
        dots = (weights * made * x).sum(1)
        loss = -torch.where(squares > 0, dots / squares.sqrt(), 0.0)
    least = loss.amin()
    best = (loss <= least + 1e-12 * least.abs()).to(torch.int8).argmax()  # the widest of equals, but for roundings
    return scales[best, 0], zeros[best, 0]


_scale = declare(
    "histogram_scale(Tensor counts, Tensor span, Tensor range, int method, float parameter, int q_min, int q_max, "
    "bool symmetric, float divisor) -> (Tensor, Tensor)",
    fake=_fake,
    reference=_reference,
)


def histogram_scale(
    counts: Tensor,
    span: Tensor,
    range: Tensor,
    *,
    method: str,
    parameter: float | None = None,
    q_min: int,
    q_max: int,
    symmetric: bool = True,
    divisor: float = 0.0,
    percentile: float | None = None,
    norm: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale fp32 [1, 1] and zero point int8 [1, 1] (empty if symmetric) of the values that a histogram counted.

    counts, span: as `histogram_accumulate` left them; range fp32 [2]: the exact least and greatest value. `method`:
    percentile (`parameter`, 99.99: the share of values inside the range), mse (least error to the power `parameter`,
    2), kl (the distribution of magnitudes changes least, as TensorRT's entropy calibration), eq (largest cosine between
    values and what they become), admm (from the whole range, codes and least-squares scale by turns until they stand).
    An empty histogram gives the scale of the range. `percentile` and `norm` are other names of `parameter`.
    RuntimeError: range not finite, a negative count, a parameter out of its bounds. The CUDA kernel does not wait for
    the device: of such a range or count its scale is NaN. ValueError: a method that is none of these.
    """
    if method not in METHODS:
        near = difflib.get_close_matches(method, METHODS, n=1)
        raise ValueError(
            f"histogram_scale: unknown method {method!r}"
            + (f", did you mean {near[0]!r}?" if near else f"; there are {', '.join(METHODS)}")
        )
    given = next((v for v in (parameter, percentile, norm) if v is not None), _DEFAULTS[method])
    return _scale(counts, span, range, METHODS.index(method), float(given), q_min, q_max, symmetric, divisor)
