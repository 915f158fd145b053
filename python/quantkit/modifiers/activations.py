"""Static activation scales from the ranges that calibration saw."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..calibration.statistics import Statistics
from ..config.schemes import QuantizationArgs


def static_scale(statistics: Statistics, args: QuantizationArgs) -> tuple[Tensor, Tensor | None]:
    """The scale (fp32 [1, 1]) and, if asymmetric, zero point (int8 [1, 1]) that cover the whole range seen.

    Running minimum and maximum over all tokens. Linears that read the same input have the same statistics, and so
    the same scale, which servers rely on where they fuse them.
    """
    if args.symmetric:
        divisor = ops.FP8_MAX[torch.float8_e4m3fn] if args.type == "float" else args.divisor
        return ops.symmetric_scale(statistics.tensor_absmax, divisor), None
    q_min, q_max = args.q_range
    return ops.asymmetric_scale(statistics.tensor_min, statistics.tensor_max, q_min, q_max)
