"""The CUDA GEMMs on a device: integers bit for bit, floats within derived bounds, on any stream, in a CUDA graph."""

from __future__ import annotations

import itertools

import pytest
import torch

from . import gemm_cases
from .cuda_cases import Case, assert_same
from .device import call, check_current_stream, check_graph, check_other_device, from_device, on_device
from .gemm_cases import (
    DEEP,
    EXACT,
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


@pytest.fixture(params=["sm80", "sm89", "sm90"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Kernels of that and below; all of sm_90's that there are, however few the rows."""
    major, minor = torch.cuda.get_device_capability()
    if int(request.param[2:]) > major * 10 + minor or (request.param == "sm90" and major != 9):
        pytest.skip(f"a device of {major}.{minor} has no kernels of {request.param}")
    monkeypatch.setenv("QUANTKIT_CUDA_GEMM", request.param)
    monkeypatch.setattr(gemm_cases, "float8_cut", 0.0 if request.param == "sm80" else gemm_cases.FLOAT8_CUT)
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
    """Integers bit for bit; floats on average to what bf16 rounds (test_groups holds each of them to its bound)."""
    if path == "sm80":
        pytest.skip("compared with this one")
    shape = (512, 256, 2048)
    for op, args in itertools.chain(*(cases(*shape) for cases in (int8_cases, w4a8_cases, wna16_cases, fp8_cases))):
        monkeypatch.setenv("QUANTKIT_CUDA_GEMM", path)
        found = call(op, args).cpu()
        monkeypatch.setenv("QUANTKIT_CUDA_GEMM", "sm80")
        base = call(op, args).cpu()
        if op in EXACT:
            assert_same(op, found, base)
            continue
        assert torch.equal(found.isfinite(), base.isfinite())
        there = base.isfinite()
        difference = (found[there].double() - base[there].double()).norm() / base[there].double().norm()
        assert difference < 2.0**-8, f"{op}: {difference:.1e}"


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


def test_other_device() -> None:
    check_other_device(all_ops())
