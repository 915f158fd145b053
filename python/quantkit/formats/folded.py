"""What a format that folds a Linear's weight and bias into the scales of its input needs to know of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..quantized import QuantizedTensor


@dataclass
class Folded:
    """`scale` fp32 [n, 1] of the weight, `row_sums` int64 [n] of its codes, the bias [n] if there is one, and the dtype
    of the model.
    """

    scale: Tensor
    row_sums: Tensor
    bias: Tensor | None
    dtype: torch.dtype

    @classmethod
    def of(cls, quantized: QuantizedTensor, dtype: torch.dtype) -> Folded:
        """Of a weight without a bias so far."""
        import torch

        return cls(quantized.scale, quantized.unpacked().sum(1, dtype=torch.int64), None, dtype)
