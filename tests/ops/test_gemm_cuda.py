"""The CUDA GEMMs on a device: integers bit for bit, floats within derived bounds, on any stream, in a CUDA graph."""

from __future__ import annotations

import pytest
import torch

from .cuda_cases import Case, assert_same
from .device import call, check_current_stream, check_graph, from_device, on_device
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

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("cuda_kernels")]
LARGE = ((1, 4096, 4096), (16, 4096, 4096), (64, 2048, 8192), (300, 1000, 4096))


@pytest.fixture(params=["sm80", "sm90"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "sm90" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernels of sm_90 need a device of that")
    monkeypatch.setenv("QUANTKIT_CUDA_GEMM", request.param)
    return request.param


@pytest.mark.parametrize("shape", (*SHAPES, *DEEP, *LARGE), ids=str)
def test_int8(path: str, shape: tuple[int, int, int]) -> None:
    check(call, int8_cases(*shape))


@pytest.mark.parametrize("shape", [(1, 40, 64, 3), (200, 66, 40, 34), (512, 1024, 2048, 64)], ids=str)
def test_int8_experts(path: str, shape: tuple[int, int, int, int]) -> None:
    check(call, int8_expert_cases(*shape))


@pytest.mark.parametrize("shape", (*GROUPED, *LARGE), ids=str)
def test_groups(path: str, shape: tuple[int, int, int]) -> None:
    for cases in (wna16_cases, w4a8_cases, fp8_cases, bf16_cases):
        check(call, cases(*shape))


@pytest.mark.parametrize("shape", [(1, 40, 128, 3), (200, 66, 256, 34), (512, 1024, 2048, 16)], ids=str)
def test_experts(path: str, shape: tuple[int, int, int, int]) -> None:
    check(call, expert_cases(*shape))


def all_ops() -> list[Case]:
    shape = (20, 200, 384)
    found = [*int8_cases(*shape), *int8_expert_cases(30, 72, 136, 4), *expert_cases(30, 72, 256, 4)]
    found += [case for cases in (wna16_cases, w4a8_cases, fp8_cases, bf16_cases) for case in cases(*shape)]
    assert {op for op, _ in found} == OPS
    return found


def test_both_paths_agree(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Integers, that is, bit for bit; floats are held to their bounds above."""
    if path != "sm90":
        pytest.skip("compared where there are two")
    for op, args in int8_cases(2048, 1024, 4096):
        many = call(op, args)
        monkeypatch.setenv("QUANTKIT_CUDA_GEMM", "sm80")
        assert_same(op, many, call(op, args).cpu())
        monkeypatch.setenv("QUANTKIT_CUDA_GEMM", "sm90")


def test_runs_on_the_current_stream() -> None:
    check_current_stream(all_ops(), from_device)


def test_cuda_graph() -> None:
    check_graph(all_ops(), from_device)


def test_same_bits_every_time() -> None:
    for op, args in all_ops():
        placed = on_device(args)
        first = getattr(torch.ops.quantkit, op)(*placed)
        for _ in range(5):
            assert_same(op, getattr(torch.ops.quantkit, op)(*placed), first.cpu())
