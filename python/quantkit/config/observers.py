"""How scales are found, by name: llm-compressor's observers and the searches of quantkit."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import nearest
from .fields import FieldError

# name -> quantkit's name. Ranges run over all samples: llm-compressor's memoryless observers keep the last batch's for
# activations, which no one wants.
WEIGHT_OBSERVERS: dict[str, str] = {
    "minmax": "minmax",
    "static_minmax": "minmax",
    "memoryless_minmax": "minmax",
    "mse": "mse",
    "memoryless_mse": "mse",
    "percentile": "percentile",
}
INPUT_OBSERVERS: dict[str, str] = {
    "minmax": "minmax",
    "static_minmax": "minmax",
    "memoryless_minmax": "minmax",
    "moving_average": "moving_average",
    "percentile": "percentile",
    "mse": "mse",
    "memoryless_mse": "mse",
    "kl": "kl",
    "entropy": "kl",
    "eq": "eq",
    "admm": "admm",
    "auto": "auto",
}


def observer(key: str, name: str | None, known: Mapping[str, str]) -> str | None:
    """`name` as quantkit spells it; FieldError with the nearest one if there is none of that name."""
    if name is None:
        return None
    if name not in known:
        raise FieldError(key, f"no such observer: '{name}'{nearest(name, known)}; use {', '.join(known)}")
    return known[name]
