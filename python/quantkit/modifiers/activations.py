"""Static activation scales from what calibration saw."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..calibration.statistics import Statistics, Wants, tail
from ..config.observers import INPUT_OBSERVERS
from ..config.schemes import QuantizationArgs

SEARCHES = ("percentile", "mse", "kl", "eq", "admm")
LONG_TAIL = 50.0  # of `auto`: msModelSlim's bound between searched ranges and whole ones


def wants(args: QuantizationArgs) -> Wants:
    """What the observer of static activations needs besides ranges."""
    name = INPUT_OBSERVERS[args.observer or "minmax"]
    return Wants(histogram=name in (*SEARCHES, "auto"), averages=name == "moving_average")


def static_scale(statistics: Statistics, args: QuantizationArgs) -> tuple[Tensor, Tensor | None]:
    """The scale (fp32 [1, 1]) and, if asymmetric, zero point (int8 [1, 1]), as the observer of `args` finds them.

    minmax: the whole range seen, running minimum and maximum over all tokens. moving_average: that of batch ranges.
    percentile, mse, kl, eq, admm: a search over the histogram. auto: mse, but the whole range where the largest value
    is further out than LONG_TAIL standard deviations. Linears that read the same input have the same
    statistics, and so the same scale, which servers rely on where they fuse them.
    """
    name = INPUT_OBSERVERS[args.observer or "minmax"]
    if args.dynamic == "local":  # NVFP4's global scale; those of groups are computed at run time
        largest = torch.maximum(statistics.tensor_min.abs(), statistics.tensor_max.abs())
        return ops.nvfp4_global_scale(largest).reshape(1, 1), None
    low, high = statistics.tensor_min, statistics.tensor_max
    if name == "auto":
        name = "mse" if tail(statistics) <= LONG_TAIL else "minmax"
    if name in SEARCHES and args.type == "int":
        assert statistics.histogram is not None
        seen = torch.cat((low.reshape(1), high.reshape(1)))
        q_min, q_max = args.q_range
        scale, zero_point = ops.histogram_scale(
            statistics.histogram.counts,
            statistics.histogram.span,
            seen,
            method=name,
            q_min=q_min,
            q_max=q_max,
            symmetric=args.symmetric,
            divisor=args.divisor,
            **dict(args.observer_kwargs),
        )
        return scale, None if args.symmetric else zero_point
    if name == "moving_average" and statistics.averages is not None:
        low, high = statistics.averages[0].reshape(1, 1), statistics.averages[1].reshape(1, 1)
    if args.symmetric:
        divisor = ops.FP8_MAX[torch.float8_e4m3fn] if args.type == "float" else args.divisor
        return ops.symmetric_scale(torch.maximum(low.abs(), high.abs()), divisor), None
    q_min, q_max = args.q_range
    return ops.asymmetric_scale(low, high, q_min, q_max)
