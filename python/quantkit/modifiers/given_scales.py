"""Scales that GPTQ takes as given: one integer scale for all of an input's readers, and those of float codes, which are
what rounding to nearest has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import ops
from ..quantized import QuantizedTensor
from .rtn import quantize_weight, weight_scale

if TYPE_CHECKING:
    from .gptq import Job
    from .shared import GlobalScales
    from .working import Working


@dataclass(frozen=True)
class GivenScales:
    """For `gptq_sweep`: scale fp32 and zero_point int8 (None if symmetric), [jobs, rows, groups]. Both None: the sweep
    finds them. `nearest`: the Linears of float codes, by name, rounded to nearest with these scales.
    """

    scale: Tensor | None = None
    zero_point: Tensor | None = None
    nearest: dict[str, QuantizedTensor] = field(default_factory=dict)

    def of_rows(self, rows: slice) -> GivenScales:
        scale, zero_point = (None if x is None else x[:, rows] for x in (self.scale, self.zero_point))
        return replace(self, scale=scale, zero_point=zero_point)

    def filled(self, name: str, codes: Tensor) -> QuantizedTensor:
        """Linear `name` with other codes (int8 bytes of e4m3, [rows, cols]) for the same scales."""
        found, codes = self.nearest[name], codes.view(torch.float8_e4m3fn)
        if found.packed:
            codes = ops.quantize_fp4(codes.bfloat16(), torch.ones(codes.shape[0], 1), codes.shape[1])
        return replace(found, codes=codes)


def given_scales(batch: Sequence[Job], weight: Tensor, working: Working, shared: GlobalScales) -> GivenScales:
    """Those of jobs of one shape, whose joined rows are `weight` [jobs, rows, cols]."""
    args = batch[0].args
    if args.type == "float":
        return _of_floats(batch, working, shared)
    return _one(batch, weight) if args.strategy == "tensor" else GivenScales()


def _of_floats(batch: Sequence[Job], working: Working, shared: GlobalScales) -> GivenScales:
    nearest: dict[str, QuantizedTensor] = {}
    scales = []
    for job in batch:
        parts = []
        height, _ = job.args.block
        for name in job.members:
            weight = working.weight(name)
            common = shared.of(name, working.weight)
            found = quantize_weight(
                name, weight, job.args, scale_dtype=job.scale_dtype, pack=False, global_scale=common
            )
            nearest[name] = found
            rows = torch.arange(weight.shape[0]) // (weight.shape[0] if height == -1 else height)
            parts.append(found.scale[rows])
        scales.append(torch.cat(parts))
    return GivenScales(torch.stack(scales), None, nearest)


def _one(batch: Sequence[Job], weight: Tensor) -> GivenScales:
    """One scale for all rows of each job, as a scale for each row."""
    args = replace(batch[0].args, strategy="tensor")
    scales, zeros = [], []
    for job, rows in zip(batch, weight, strict=True):
        scale, zero = weight_scale(job.members[0], rows, args, scale_dtype=job.scale_dtype)
        scales.append(scale.expand(job.rows, 1))
        zeros.append(None if zero is None else zero.expand(job.rows, 1))
    first = None if zeros[0] is None else torch.stack([z for z in zeros if z is not None])
    return GivenScales(torch.stack(scales), first)
