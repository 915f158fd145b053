"""What a run does to keep to its memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config.run_config import RunConfig


@dataclass(frozen=True)
class Means:
    """`forwards` of a layer that looks at activations (1, 2 or "auto"); where hidden states lie (`offload`: "memory" or
    "disk"); how many experts of a layer are in memory at once (None: all).
    """

    forwards: int | str
    offload: str
    experts: int | None = None


def means(config: RunConfig) -> Means:
    """As the configuration has it; `low_memory` takes the tightest of what is not said."""
    forwards, offload = config.global_.calibration_forwards, config.calibration.offload
    if config.calibration.statistics is not None:
        return Means(2, "disk")  # there are no hidden states, and nothing waits
    if config.low_memory:
        return Means(2 if forwards == "auto" else forwards, "disk")
    return Means(forwards, offload)
