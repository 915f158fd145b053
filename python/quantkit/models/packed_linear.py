"""Linears whose bf16 weights are laid out once for oneDNN instead of at every call, for layers that run many batches.

A plain bf16 `F.linear` on the CPU reorders the weight each time, a tenth of its time at a thousand rows. PyTorch has
the pre-packed form for its compiler (`torch.ops.mkldnn`); where it lacks it, Linears run as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def available() -> bool:
    """Whether this PyTorch can pack bf16 weights on this CPU."""
    ops = torch.ops.mkldnn
    names = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    return (
        torch.backends.mkldnn.is_available()
        and all(hasattr(ops, n) for n in names)
        and bool(ops._is_mkldnn_bf16_supported())
    )


@contextmanager
def packed(linears: Iterable[nn.Linear], rows: int) -> Iterator[None]:
    """Within the block, `linears` run with packed weights, best for inputs of `rows` rows. Their hooks still run. A
    weight is packed at its first call, and its successor likewise if it is replaced meanwhile.
    """
    usable = available()
    replaced = [m for m in linears if usable and m.weight.dtype == torch.bfloat16 and m.weight.device.type == "cpu"]
    try:
        for linear in replaced:
            linear.__dict__["forward"] = _forward(linear, rows)
        yield
    finally:
        for linear in replaced:
            linear.__dict__.pop("forward", None)


def _forward(linear: nn.Linear, rows: int) -> Callable[[Tensor], Tensor]:
    of: Tensor | None = None
    weight: Tensor | None = None
    multiply = torch.ops.mkldnn._linear_pointwise

    def forward(x: Tensor) -> Tensor:
        nonlocal of, weight
        if of is not linear.weight:
            of, weight = linear.weight, torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)
        result: Tensor = multiply(x, weight, linear.bias, "none", [], "")
        return result

    return forward
