"""The CUDA GEMMs on a device: integers bit for bit, floats within derived bounds, on any stream, in a CUDA graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import quantkit.ops as ops

from .cuda_cases import Case, assert_same, relocate
from .gemm_cases import (
    DEEP,
    GROUPED,
    OPS,
    SHAPES,
    bf16_cases,
    check,
    expert_cases,
    fp8_cases,
    int8_cases,
    int8_expert_cases,
    w4a8_cases,
    wna16_cases,
)

pytestmark = pytest.mark.cuda
LARGE = ((1, 4096, 4096), (16, 4096, 4096), (64, 2048, 8192), (300, 1000, 4096))


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    ops._load.require("cuda")


def on_device(args: tuple[Any, ...]) -> list[Any]:
    return [relocate(arg, lambda t: t.cuda()) for arg in args]


def call(op: str, args: tuple[Any, ...]) -> Any:
    return getattr(torch.ops.quantkit, op)(*on_device(args))


@pytest.mark.parametrize("shape", (*SHAPES, *DEEP, *LARGE), ids=str)
def test_int8(shape: tuple[int, int, int]) -> None:
    check(call, int8_cases(*shape))


@pytest.mark.parametrize("shape", [(1, 40, 64, 3), (200, 66, 40, 34), (512, 1024, 2048, 64)], ids=str)
def test_int8_experts(shape: tuple[int, int, int, int]) -> None:
    check(call, int8_expert_cases(*shape))


@pytest.mark.parametrize("shape", (*GROUPED, *LARGE), ids=str)
def test_groups(shape: tuple[int, int, int]) -> None:
    for cases in (wna16_cases, w4a8_cases, fp8_cases, bf16_cases):
        check(call, cases(*shape))


@pytest.mark.parametrize("shape", [(1, 40, 128, 3), (200, 66, 256, 34), (512, 1024, 2048, 16)], ids=str)
def test_experts(shape: tuple[int, int, int, int]) -> None:
    check(call, expert_cases(*shape))


def all_ops() -> list[Case]:
    shape = (20, 200, 384)
    found = [*int8_cases(*shape), *int8_expert_cases(30, 72, 136, 4), *expert_cases(30, 72, 256, 4)]
    found += [case for cases in (wna16_cases, w4a8_cases, fp8_cases, bf16_cases) for case in cases(*shape)]
    assert {op for op, _ in found} == OPS
    return found


def test_runs_on_the_current_stream() -> None:
    stream = torch.cuda.Stream()
    for op, args in all_ops():
        placed = on_device(args)
        wanted = getattr(torch.ops.quantkit, op)(*placed)
        late = [torch.zeros_like(a) if isinstance(a, Tensor) else a for a in placed]
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # an op on another stream would read the zeros
            for source, target in zip(placed, late, strict=True):
                if isinstance(source, Tensor):
                    target.copy_(source)
            got = getattr(torch.ops.quantkit, op)(*late)
        stream.synchronize()
        assert_same(op, got, wanted.cpu())


def test_cuda_graph() -> None:
    for op, args in all_ops():
        placed = on_device(args)
        wanted = getattr(torch.ops.quantkit, op)(*placed)  # loads the kernel, which a capture does not allow
        still = [torch.zeros_like(a) if isinstance(a, Tensor) else a for a in placed]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = getattr(torch.ops.quantkit, op)(*still)
        for source, target in zip(placed, still, strict=True):
            if isinstance(source, Tensor):
                target.copy_(source)
        graph.replay()
        torch.cuda.synchronize()
        assert_same(op, got, wanted.cpu())


def test_same_bits_every_time() -> None:
    for op, args in all_ops():
        placed = on_device(args)
        first = getattr(torch.ops.quantkit, op)(*placed)
        for _ in range(5):
            assert_same(op, getattr(torch.ops.quantkit, op)(*placed), first.cpu())
