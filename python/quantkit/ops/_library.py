"""The torch library that holds every quantkit op, and the one way an op is declared.

An op is a schema, a fake (shapes and dtypes only, for torch.compile) and a reference in plain torch. The
reference is registered as the default kernel, so an op exists on every device; the compiled libraries add
faster kernels for CPU and CUDA, which take precedence when they are loaded (`quantkit.ops._load`).

An op says which devices the compiled libraries have a kernel for. On any other its reference is the kernel: it is made
of torch's own fast ops there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

NAMESPACE = "quantkit"
_LIB = torch.library.Library(NAMESPACE, "FRAGMENT")
REFERENCES: dict[str, Callable[..., Any]] = {}
_KERNELS: dict[str, tuple[str, ...]] = {}


def compiled_ops(device: str) -> list[str]:
    """The ops that the compiled library for "CPU" or "CUDA" has a kernel for."""
    return [name for name, devices in _KERNELS.items() if device in devices]


def declare(
    schema: str,
    *,
    fake: Callable[..., Any],
    reference: Callable[..., Any],
    kernels: tuple[str, ...] = ("CPU", "CUDA"),
) -> torch._ops.OpOverload:
    """Define `quantkit::<schema>` with its fake and its reference kernel; gives back the callable overload.

    `kernels` are the devices that the compiled libraries have one for: both, or one or none where torch's ops do it
    well.
    """
    name = schema[: schema.index("(")]
    _LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIB)
    _LIB.impl(name, reference, "CompositeExplicitAutograd")
    REFERENCES[name] = reference
    _KERNELS[name] = kernels
    return getattr(torch.ops.quantkit, name).default


def grid(rows: int, cols: int, block: Sequence[int]) -> tuple[int, int]:
    """Shape of the scale grid: how many blocks cover `rows` x `cols`; -1 in `block` is the whole extent."""
    block_rows, block_cols = (rows if block[0] == -1 else block[0], cols if block[1] == -1 else block[1])
    return -(-rows // max(block_rows, 1)), -(-cols // max(block_cols, 1))


def expand(per_block: torch.Tensor, rows: int, cols: int, block: Sequence[int]) -> torch.Tensor:
    """A per-block value [grid rows, grid cols] repeated over its elements: [rows, cols]."""
    block_rows, block_cols = (rows if block[0] == -1 else block[0], cols if block[1] == -1 else block[1])
    return per_block.repeat_interleave(block_rows, 0)[:rows].repeat_interleave(block_cols, 1)[:, :cols]


def check_matrix(op: str, x: torch.Tensor, block: Sequence[int]) -> None:
    """The checks that all blocked ops share; the compiled kernels make the same ones with the same words."""
    torch._check(x.dim() == 2, lambda: f"quantkit::{op}: x must be 2-D [rows, cols], got {x.dim()}-D")
    torch._check(len(block) == 2, lambda: f"quantkit::{op}: block must be [rows, cols], got {list(block)}")
    torch._check(
        all(b == -1 or b > 0 for b in block),
        lambda: f"quantkit::{op}: block sizes must be positive, or -1 for the whole extent, got {list(block)}",
    )


def check_float(op: str, name: str, x: torch.Tensor) -> None:
    torch._check(
        x.dtype in (torch.float32, torch.float16, torch.bfloat16),
        lambda: f"quantkit::{op}: {name} must be float32, float16 or bfloat16, got {x.dtype}",
    )


def check_code_range(op: str, q_min: int, q_max: int) -> None:
    torch._check(
        -128 <= q_min < q_max <= 127, lambda: f"quantkit::{op}: [q_min, q_max] must fit int8, got [{q_min}, {q_max}]"
    )
