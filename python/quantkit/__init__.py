"""quantkit: quantize large language models and run the quantized layers. Importing it imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._oneshot import oneshot

__version__ = "0.1.0"
__all__ = ["__version__", "oneshot"]


def __getattr__(name: str) -> Any:
    """`oneshot`, imported when it is first asked for."""
    if name == "oneshot":
        from ._oneshot import oneshot

        return oneshot
    raise AttributeError(f"module 'quantkit' has no attribute '{name}'")
