"""quantkit: quantize large language models and run the quantized layers. Importing it imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._oneshot import oneshot
    from .runtime.attention import register_attention
    from .runtime.cache import QuantizedCache
    from .runtime.load import load
    from .runtime.swap import swap_linears

__version__ = "0.1.0"
__all__ = ["QuantizedCache", "__version__", "load", "oneshot", "register_attention", "swap_linears"]
# Where each name comes from; its module is imported when it is first asked for.
_LAZY = {
    "QuantizedCache": ".runtime.cache",
    "load": ".runtime.load",
    "oneshot": "._oneshot",
    "register_attention": ".runtime.attention",
    "swap_linears": ".runtime.swap",
}


def __getattr__(name: str) -> Any:
    """The names of `_LAZY`, imported when they are first asked for."""
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module 'quantkit' has no attribute '{name}'")
