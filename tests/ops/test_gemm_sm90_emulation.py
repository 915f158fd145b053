"""The GEMMs for many rows on sm_90 (wgmma, bulk copies), run on the CPU: integers bit for bit, floats within bounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import quantkit.ops as ops

from . import emulated_cuda
from .gemm_cases import check, codes, int8_cases, int8_expert_cases

pytestmark = [
    pytest.mark.skipif(emulated_cuda.compiler() is None, reason="no C++ compiler: set CXX"),
    pytest.mark.usefixtures("one_thread"),
]

# (M, N, K): tiles of 128 and 256 rows and two panels, full and not, several for a block; depths of less than a stage
# (128 codes), and two that are split, one into parts longer than the ring.
SHAPES = ((1, 1, 1), (70, 130, 129), (130, 140, 72), (300, 300, 200), (65, 128, 1100), (140, 130, 1400))


@pytest.fixture(autouse=True)
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTKIT_CUDA_GEMM", "sm90")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8(emulated: Any, shape: tuple[int, int, int]) -> None:
    check(emulated, int8_cases(*shape))


@pytest.mark.parametrize("shape", [(40, 70, 132, 5), (400, 66, 40, 3)], ids=str)
def test_int8_experts(emulated: Any, shape: tuple[int, int, int, int]) -> None:
    check(emulated, int8_expert_cases(*shape))


def test_int8_at_its_limits(emulated: Any) -> None:
    """Sums next to 2^31, and codes of -128 on both sides."""
    a = torch.full((2, 2048), -128, dtype=torch.int8)
    w = torch.full((3, 2048), -128, dtype=torch.int8)
    w[1] = 127
    assert emulated("int8_gemm", (a, ops.pack_w8a8(w), 3))[0].tolist() == [2048 * 16384, -2048 * 16256, 2048 * 16384]


def test_a_path_that_is_none(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTKIT_CUDA_GEMM", "sm75")
    with pytest.raises(RuntimeError, match="QUANTKIT_CUDA_GEMM must be sm80 or sm90, got sm75"):
        emulated("int8_gemm", (codes(2, 8), ops.pack_w8a8(codes(4, 8)), 4))
