"""Ops on a device, for the tests of its kernels: called, on a stream of their own, in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from .cuda_cases import Case, assert_same, relocate, results


def on_device(args: tuple[Any, ...]) -> list[Any]:
    return [relocate(arg, lambda t: t.cuda()) for arg in args]


def run(op: str, placed: list[Any]) -> Any:
    return results(op, getattr(torch.ops.quantkit, op)(*placed), placed)


def call(op: str, args: tuple[Any, ...]) -> Any:
    return run(op, on_device(args))


def to_cpu(found: Any) -> Any:
    return tuple(t.cpu() for t in found) if isinstance(found, (tuple, list)) else found.cpu()


def from_device(op: str, args: tuple[Any, ...]) -> Any:
    """What the op gives there, brought here."""
    return to_cpu(call(op, args))


def check_current_stream(cases: Iterable[Case], wanted: Callable[[str, tuple[Any, ...]], Any]) -> None:
    """An op on another stream than the current one would read zeros."""
    stream = torch.cuda.Stream()
    for op, args in cases:
        expected, placed = wanted(op, args), on_device(args)
        late = [torch.zeros_like(a) if isinstance(a, Tensor) else a for a in placed]
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            for source, target in zip(placed, late, strict=True):
                if isinstance(source, Tensor):
                    target.copy_(source)
            got = run(op, late)
        stream.synchronize()
        assert_same(op, got, expected)


def check_other_device(cases: Iterable[Case]) -> None:
    """Each tensor in turn is left on the CPU: an error, not an address that means nothing to the device."""
    for op, args in cases:
        placed = on_device(args)
        tensors = [i for i, arg in enumerate(args) if isinstance(arg, Tensor)]
        for i in tensors if len(tensors) > 1 else ():
            mixed = [*placed[:i], args[i], *placed[i + 1 :]]
            with pytest.raises(RuntimeError, match=f"quantkit.*{op if i else ''}.*device"):
                getattr(torch.ops.quantkit, op)(*mixed)


def check_graph(cases: Iterable[Case], wanted: Callable[[str, tuple[Any, ...]], Any]) -> None:
    """Captured on zeros, replayed on the arguments."""
    for op, args in cases:
        expected, placed = wanted(op, args), on_device(args)
        still = [torch.zeros_like(a) if isinstance(a, Tensor) else a for a in placed]
        run(op, still)  # loads the kernel, which a capture does not allow
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = run(op, still)
        for source, target in zip(placed, still, strict=True):
            if isinstance(source, Tensor):
                target.copy_(source)
        graph.replay()
        torch.cuda.synchronize()
        assert_same(op, got, expected)
