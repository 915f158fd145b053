"""What the inputs of a Linear were like over the calibration data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..errors import CalibrationError

HISTOGRAM_BINS = 8192
# Rows of a Gram matrix that are added at once, from the diagonal on.
ROWS = 128


@dataclass(frozen=True)
class Wants:
    """What to gather of an input besides count and ranges. `gram`: x^T x and the sum of |x|; `histogram` of all values;
    `averages`: a moving average of each batch's range.
    """

    gram: bool = False
    histogram: bool = False
    averages: bool = False

    def __or__(self, other: Wants) -> Wants:
        return Wants(self.gram or other.gram, self.histogram or other.histogram, self.averages or other.averages)


@dataclass
class Histogram:
    """`counts` int64 [HISTOGRAM_BINS] over [-span, span]; `span` fp32 [1], a power of two, 0 before anything came."""

    counts: Tensor
    span: Tensor


@dataclass
class Statistics:
    """Of one input [tokens, channels]: how many tokens there were, each channel's smallest and largest value and sum of
    magnitudes (fp32 [channels]), `gram` = x^T x (fp32 [channels, channels]), a histogram, and each batch's lowest and
    highest value (`extremes`, fp32 [batches, 2]). They merge by sum, min or max, extremes by order; see `tree` for that
    of floating-point sums. Linears that read the same tensor share one object. `divided`: what each channel has been
    divided by since (fp32 [channels]). `upper`: below its diagonal `gram` waits for `complete`.
    """

    count: int
    min: Tensor
    max: Tensor
    absum: Tensor | None = None
    gram: Tensor | None = None
    histogram: Histogram | None = None
    extremes: Tensor | None = None
    divided: Tensor | None = None
    upper: bool = False
    _channels: Tensor | None = None

    @classmethod
    def empty(cls, channels: int, wants: Wants, memory: Tensor | None = None) -> Statistics:
        """Of nothing yet. `memory` (fp32 [channels, channels]) may be used for the Gram matrix."""
        found = cls(0, torch.full((channels,), torch.inf), torch.full((channels,), -torch.inf))
        if wants.gram:
            # One buffer, as the op that makes the Gram matrix fills it in the same pass.
            rows = torch.stack((found.min, found.max, torch.zeros(channels)))
            found.min, found.max, found.absum = rows
            # What is in it until the first tokens come does not matter.
            found.gram = torch.empty(channels, channels) if memory is None else memory
            found.upper, found._channels = True, rows
        if wants.histogram:
            found.histogram = Histogram(torch.zeros(HISTOGRAM_BINS, dtype=torch.int64), torch.zeros(1))
        if wants.averages:
            found.extremes = torch.empty(0, 2)
        return found

    @classmethod
    def of(cls, x: Tensor, where: str, wants: Wants | None = None) -> Statistics:
        """Of x [tokens, channels] (fp32, fp16, bf16; at least one token). `where` names the input in errors."""
        found = cls.empty(x.shape[1], wants or Wants())
        found.update(x, where)
        return found.complete()

    def complete(self) -> Statistics:
        """This, with all of its Gram matrix; no more tokens may come."""
        if self.upper and self.gram is not None:
            ops.mirror_upper(self.gram)
        self.upper = False
        return self

    def update(self, x: Tensor, where: str | Callable[[], str]) -> None:
        """Take in x [tokens, channels]; CalibrationError for NaN and Inf, naming `where` and the channels."""
        if self.gram is not None and self._channels is not None:
            ops.gram_upper(x, self.gram, channels=self._channels, fresh=self.count == 0)
            low, high = self.min, self.max
        else:
            low, high = (extreme.reshape(-1) for extreme in ops.minmax(x, [-1, 1]))
        # NaN and Inf survive min and max, so looking at these is enough.
        bad = ~(torch.isfinite(low) & torch.isfinite(high))
        if bool(bad.any()):
            channels = bad.nonzero().flatten().tolist()
            place = where if isinstance(where, str) else where()
            raise CalibrationError(
                f"{place}: NaN or Inf in {len(channels)} of {x.shape[1]} input channels (first: {channels[0]}); the "
                "model does not run in this dtype, or its checkpoint is damaged"
            )
        self.count += x.shape[0]
        torch.minimum(self.min, low, out=self.min)
        torch.maximum(self.max, high, out=self.max)
        if self.histogram is not None:
            ops.histogram_accumulate(x, self.histogram.counts, self.histogram.span)
        if self.extremes is not None:
            if self.gram is not None:  # what the Gram matrix's op gives are those of all batches so far
                low, high = ops.minmax(x, [-1, 1])
            self.extremes = torch.cat((self.extremes, torch.stack((low.min(), high.max()))[None]))

    def merge(self, other: Statistics) -> None:
        """Take in what `other` saw, in later batches."""
        self.count += other.count
        torch.minimum(self.min, other.min, out=self.min)
        torch.maximum(self.max, other.max, out=self.max)
        if self.absum is not None and other.absum is not None:
            self.absum += other.absum
        if self.gram is not None and other.gram is not None:
            _add(self.gram, other.gram, upper=self.upper or other.upper)
            self.upper = self.upper or other.upper
        if self.histogram is not None and other.histogram is not None:
            mine, theirs = self.histogram, other.histogram
            self.histogram = Histogram(*ops.merge_histograms(mine.counts, mine.span, theirs.counts, theirs.span))
        if self.extremes is not None and other.extremes is not None:
            self.extremes = torch.cat((self.extremes, other.extremes))

    def copy(self, *, gram: bool = True) -> Statistics:
        """One that merges without changing this one; without the Gram matrix if that is not wanted."""

        def clone(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.clone()

        histogram = self.histogram and Histogram(self.histogram.counts.clone(), self.histogram.span.clone())
        return Statistics(
            self.count,
            self.min.clone(),
            self.max.clone(),
            clone(self.absum),
            clone(self.gram) if gram else None,
            histogram,
            clone(self.extremes),
            upper=gram and self.upper,
        )

    def divide(self, s: Tensor) -> None:
        """What the statistics are once channel k of the input is divided by s[k] > 0 (fp32 [channels])."""
        self.min /= s
        self.max /= s
        if self.absum is not None:
            self.absum /= s
        if self.gram is not None:
            self.gram /= s
            self.gram /= s[:, None]
        self.divided = s.clone() if self.divided is None else self.divided * s

    @property
    def averages(self) -> Tensor | None:
        """Moving averages of the batches' lowest and highest values, in their order: fp32 [2]."""
        if self.extremes is None:
            return None
        found = torch.full((2,), torch.nan)
        for i, seen in enumerate(self.extremes):
            # llm-compressor's averaging_constant.
            found = seen if i == 0 else found + 0.01 * (seen - found)
        return found

    @property
    def absmax(self) -> Tensor:
        """Largest magnitude of each channel: fp32 [channels]."""
        return torch.maximum(self.min.abs(), self.max.abs())

    @property
    def tensor_min(self) -> Tensor:
        """Smallest value overall, as the scale ops take it for block [-1, -1]: fp32 [1, 1]."""
        return self.min.min().reshape(1, 1)

    @property
    def tensor_max(self) -> Tensor:
        """Largest value overall: fp32 [1, 1]."""
        return self.max.max().reshape(1, 1)

    @property
    def tensor_absmax(self) -> Tensor:
        """Largest magnitude overall: fp32 [1, 1]."""
        return torch.maximum(self.tensor_min.abs(), self.tensor_max.abs())


def _add(gram: Tensor, other: Tensor, *, upper: bool) -> None:
    """gram += other, or their upper halves."""
    if not upper:
        gram += other
        return
    for begin in range(0, len(gram), ROWS):
        gram[begin : begin + ROWS, begin:] += other[begin : begin + ROWS, begin:]


def tail(seen: Statistics) -> float:
    """The largest magnitude over the standard deviation of all values; 0 of an input that is always zero."""
    assert seen.histogram is not None
    counts, span = seen.histogram.counts.double(), float(seen.histogram.span)
    bins = counts.numel()
    centers = (torch.arange(bins, dtype=torch.float64) + 0.5) * (2 * span / bins) - span
    total = counts.sum()
    mean = (counts * centers).sum() / total
    deviation = float(((counts * (centers - mean).square()).sum() / total).sqrt())
    largest = float(torch.maximum(seen.min.abs().max(), seen.max.abs().max()))
    return largest / deviation if largest > 0 and deviation > 0 else 0.0
