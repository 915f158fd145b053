"""What every modifier is, and where it puts what it makes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from ..calibration.statistics import Statistics
from ..calibration.sweep import Layer
from ..quantized import QuantizedTensor


class Sink(Protocol):
    """Takes results as they come, in any order: a format behind a checkpoint writer, or a test."""

    def weight(self, module: str, quantized: QuantizedTensor) -> None:
        """The quantized weight of `module`."""
        ...

    def input(self, module: str, scale: Tensor, zero_point: Tensor | None) -> None:
        """The static input scale (fp32 [1, 1]) and zero point (int8 [1, 1]) of `module`."""
        ...


class Modifier(Protocol):
    """Works on one decoder layer at a time; it is what the sweep visits layers with (`calibration.sweep.Visitor`)."""

    second_forward: bool

    def prepare(self, layer: Layer) -> None:
        """Before the layer's calibration forward."""
        ...

    def finish(self, layer: Layer, statistics: Mapping[str, Statistics]) -> None:
        """After it, with the statistics of every wanted Linear's input."""
        ...
