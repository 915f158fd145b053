"""Where modifiers put what they make. A modifier itself is a `calibration.sweep.Visitor`: prepare, forward, finish."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..quantized import QuantizedTensor


class Sink(Protocol):
    """Takes results as they come, in any order: a format behind a checkpoint writer, or a test."""

    def weight(self, module: str, quantized: QuantizedTensor) -> None:
        """The quantized weight of `module`."""
        ...

    def input(self, module: str, scale: Tensor, zero_point: Tensor | None) -> None:
        """The static input scale (fp32 [1, 1]) and zero point (int8 [1, 1]) of `module`."""
        ...
