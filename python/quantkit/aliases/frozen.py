"""Weights that are packed once for aliases whose peers take them as they are stored.

quantkit's GEMMs read weights in a layout of their own. An alias that gets a plain weight has to pack it at each call,
unless it was told that the weight will not change. What is frozen is a piece of memory: views of it are recognised,
copies are not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

_Key = tuple[Any, ...]


@dataclass
class _Frozen:
    weight: Tensor  # kept alive, so that nothing else comes to lie at its address
    packed: dict[str, Any] = field(default_factory=dict)


_LOCK = threading.Lock()
_FROZEN: dict[_Key, _Frozen] = {}


def _key(weight: Tensor) -> _Key:
    """The memory that it is; the same for a transposed view."""
    axes = sorted(zip(weight.stride(), weight.shape, strict=True))
    return (weight.device, weight.data_ptr(), weight.dtype, *axes)


def freeze(weight: Tensor) -> None:
    """A promise that `weight`, an argument of an alias (`cutlass_scaled_mm`'s b, say, or `awq_gemm`'s _kernel), does
    not change until `thaw(weight)`. It is packed at its first use, not at each, and kept along with what that made.
    """
    with _LOCK:
        _FROZEN.setdefault(_key(weight), _Frozen(weight))


def thaw(weight: Tensor) -> None:
    """`weight` may change again; what was packed is dropped. ValueError: it is not frozen."""
    with _LOCK:
        if _FROZEN.pop(_key(weight), None) is None:
            raise ValueError(f"thaw: this weight {list(weight.shape)} is not frozen")


def packed(how: str, weight: Tensor, pack: Callable[[], Any]) -> Any:
    """What `pack` makes of the weight; kept under `how` if it is frozen."""
    if not _FROZEN:
        return pack()
    frozen = _FROZEN.get(_key(weight))
    if frozen is None:
        return pack()
    if how not in frozen.packed:
        frozen.packed[how] = pack()
    return frozen.packed[how]
