"""What the tests of the CPU kernels share: matrices that they may stumble over, the comparison with the reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import quantkit.ops as ops

from .cuda_cases import assert_same

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# Columns around the widths of the kernels: 16 lanes, 32 keys, 64 nibbles, and a ragged last group of each.
SHAPES = ((1, 1), (3, 5), (7, 64), (33, 130), (5, 300), (130, 257))
BLOCKS = ([-1, -1], [1, -1], [1, 1], [1, 3], [1, 32], [1, 128], [-1, 1], [128, 128], [3, 5], [2, 1], [40, -1], [-1, 7])
KINDS = ("normal", "special", "zero rows", "tiny", "huge")
SPECIAL = (0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-40, -1e-45, 3e38, 65504.0, 0.5, 1.5, 2.5, -128.5)


def matrix(rows: int, cols: int, dtype: torch.dtype, kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + cols)
    x = torch.randn(rows, cols, generator=generator)
    if kind == "special":
        places = torch.randint(x.numel(), (1 + x.numel() // 50,), generator=generator)
        values = torch.randint(len(SPECIAL), places.shape, generator=generator)
        x.view(-1)[places] = torch.tensor(SPECIAL)[values]
    elif kind == "zero rows":
        x[::2] = 0.0
    elif kind == "tiny":
        x = x * 1e-38
    elif kind == "huge":
        x = x * 1e37
    return x.to(dtype)


def matrices(dtype: torch.dtype, kind: str) -> Iterator[Tensor]:
    """Every shape, contiguous and as a slice: rows apart, their beginning off any alignment."""
    for rows, cols in SHAPES:
        wide = matrix(rows, cols + 3, dtype, kind)
        yield wide[:, :cols].contiguous()
        yield wide[:, 1 : 1 + cols]


def reference(op: str, *args: Any) -> Any:
    return ops._library.REFERENCES[op](*args)


def call(op: str, *args: Any) -> Any:
    return getattr(torch.ops.quantkit, op)(*args)


def check(op: str, *args: Any) -> None:
    """The kernel's result is the reference's, bit for bit."""
    try:
        assert_same(op, call(op, *args), reference(op, *args))
    except (AssertionError, RuntimeError) as error:
        shown = [f"{list(a.shape)} {a.dtype} {a.stride()}" if isinstance(a, Tensor) else a for a in args]
        raise AssertionError(f"{op}{shown}: {error}") from error


def check_compiles(op: str, *args: Any) -> None:
    """opcheck, and the same result from a compiled graph without breaks."""
    overload = getattr(torch.ops.quantkit, op).default
    torch.library.opcheck(overload, args)
    torch.compiler.reset()
    compiled = torch.compile(lambda *inputs: overload(*inputs), fullgraph=True, backend="aot_eager")
    assert_same(op, compiled(*args), reference(op, *args))


def check_refused(op: str, message: str, *args: Any) -> None:
    """Kernel and reference refuse with the same words."""
    for function in (call, reference):
        with pytest.raises(RuntimeError, match=message):
            function(op, *args)
