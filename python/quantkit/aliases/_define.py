"""How an alias is declared, and what all of them share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.ops._library import NAMESPACE

_LIB = torch.library.Library(NAMESPACE, "FRAGMENT")


@dataclass(frozen=True)
class Alias:
    """One op in another project's words: its overload here, and whose it is ("vllm", "sglang", or both)."""

    overload: torch._ops.OpOverload
    peer: str


ALIASES: dict[str, Alias] = {}  # by name and overload, as "gptq_gemm" or "gptq_gemm.sglang"
_Function = Callable[..., Any]


def alias(peer: str, schema: str, fake: _Function | None = None) -> Callable[[_Function], _Function]:
    """Registers the decorated function as `quantkit::<schema>` on every device.

    `fake` gives back what the op does, empty; an op that only writes to its arguments needs none.
    """
    qualified = schema[: schema.index("(")]
    name, _, overload = qualified.partition(".")

    def register(function: _Function) -> _Function:
        _LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIB.impl(qualified, function, "CompositeExplicitAutograd")
        has_tensors = any("Tensor" in str(a.type) for a in torch._C.parse_schema(schema).arguments)
        if has_tensors:
            torch.library.register_fake(f"{NAMESPACE}::{qualified}", fake or _nothing, lib=_LIB)
        packet = getattr(torch.ops.quantkit, name)
        ALIASES[qualified] = Alias(getattr(packet, overload or "default"), peer)
        return function

    return register


def _nothing(*_args: Any, **_more: Any) -> None:
    return None


def check(op: str, condition: bool, message: Callable[[], str]) -> None:
    """RuntimeError in the words of the ops."""
    torch._check(condition, lambda: f"quantkit::{op}: {message()}")


def matrix(x: Tensor) -> Tensor:
    """x [..., cols] as [rows, cols]."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def one(scale: Tensor, x: Tensor) -> Tensor:
    """One fp32 number as the grid of a single block over x [rows, cols]: [1, 1], or [0, 1] for no rows."""
    return scale.reshape(1, 1).float()[: len(x)]


def store(op: str, name: str, target: Tensor, values: Tensor) -> None:
    """Writes an argument: `values` in its shape, or in its first rows where it has more of them."""
    check(
        op,
        target.device == values.device and target.dtype == values.dtype,
        lambda: f"{name} must be {values.dtype} on {values.device}, got {target.dtype} on {target.device}",
    )
    if target.numel() == values.numel():
        target.copy_(values.reshape(target.shape))
        return
    check(
        op,
        target.dim() == values.dim() and target.shape[1:] == values.shape[1:] and len(target) >= len(values),
        lambda: f"{name} must be {list(values.shape)}, or have more rows, got {list(target.shape)}",
    )
    target[: len(values)].copy_(values)
