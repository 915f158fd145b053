"""What the inputs of a Linear were like over the calibration data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..errors import CalibrationError


@dataclass
class Statistics:
    """Of one input [tokens, channels]: how many tokens there were, and each channel's smallest and largest value
    (fp32 [channels]). Every field merges (sum, min, max), so batches may come in any split. Linears that read the same
    tensor share one object.
    """

    count: int
    min: Tensor
    max: Tensor

    @classmethod
    def of(cls, x: Tensor, where: str) -> Statistics:
        """Of x [tokens, channels] (fp32, fp16, bf16; at least one token). `where` names the input in errors."""
        low, high = ops.minmax(x, [-1, 1])
        statistics = cls(x.shape[0], low.reshape(-1), high.reshape(-1))
        # NaN and Inf survive min and max, so looking at these is enough.
        bad = ~(torch.isfinite(statistics.min) & torch.isfinite(statistics.max))
        if bool(bad.any()):
            channels = bad.nonzero().flatten().tolist()
            raise CalibrationError(
                f"{where}: NaN or Inf in {len(channels)} of {x.shape[1]} input channels (first: {channels[0]}); the "
                "model does not run in this dtype, or its checkpoint is damaged"
            )
        return statistics

    def merge(self, other: Statistics) -> None:
        """Take in what `other` saw."""
        self.count += other.count
        torch.minimum(self.min, other.min, out=self.min)
        torch.maximum(self.max, other.max, out=self.max)

    def copy(self) -> Statistics:
        """One that merges without changing this one."""
        return Statistics(self.count, self.min.clone(), self.max.clone())

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
