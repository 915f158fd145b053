"""Where modifiers put what they make."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..quantized import QuantizedTensor


class Sink(Protocol):
    """Takes results as they come, in any order: a format behind a checkpoint writer, a model in memory, or a test."""

    def weight(self, module: str, quantized: QuantizedTensor) -> None:
        """The quantized weight of `module`."""
        ...

    def input(self, module: str, scale: Tensor, zero_point: Tensor | None) -> None:
        """The static input scale (fp32 [1, 1]) and zero point (int8 [1, 1]) of `module`."""
        ...

    def tensor(self, name: str, value: Tensor) -> None:
        """A tensor that stays in full precision and that a transform has changed; dtype and shape are as they were."""
        ...

    def query(self, attention: str, scale: Tensor) -> None:
        """The scale of the queries of the module `attention`: fp32 [1], or [heads] per head."""
        ...

    def cache(self, attention: str, key_scale: Tensor, value_scale: Tensor) -> None:
        """Scales of the keys and values that the module `attention` caches: fp32 [1], [heads] per head, or [heads *
        head size] per channel.
        """
        ...
