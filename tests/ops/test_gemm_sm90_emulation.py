"""The GEMMs for many rows on sm_90 (wgmma, bulk copies), run on the CPU: integers bit for bit, floats within bounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import quantkit.ops as ops

from . import emulated_cuda
from .cuda_cases import assert_same
from .gemm_cases import (
    bf16_cases,
    check,
    codes,
    expected_fp8,
    expert_cases,
    fp8_cases,
    int8_cases,
    int8_expert_cases,
    w4a8_cases,
    wna16_cases,
)

pytestmark = [
    pytest.mark.skipif(emulated_cuda.compiler() is None, reason="no C++ compiler: set CXX"),
    pytest.mark.usefixtures("one_thread"),
]

# (M, N, K): tiles of 128 and 256 rows and two panels, full and not, several for a block; depths of less than a stage
# (128 codes), and two that are split, one into parts longer than the ring.
SHAPES = ((1, 1, 1), (70, 130, 129), (130, 140, 72), (300, 300, 200), (65, 128, 1100), (140, 130, 1400))


# Groups of 64, 128 and all of K; two stages of FP8 codes and more; a split of K.
GROUPED = ((1, 1, 24), (70, 130, 192), (130, 70, 384), (140, 300, 128), (66, 128, 1408))


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


@pytest.mark.parametrize("shape", GROUPED, ids=str)
def test_fp8(emulated: Any, shape: tuple[int, int, int]) -> None:
    check(emulated, fp8_cases(*shape))


@pytest.mark.parametrize("shape", GROUPED, ids=str)
def test_w4a8(emulated: Any, shape: tuple[int, int, int]) -> None:
    check(emulated, w4a8_cases(*shape))


@pytest.mark.parametrize("shape", GROUPED, ids=str)
def test_wna16(emulated: Any, shape: tuple[int, int, int]) -> None:
    check(emulated, wna16_cases(*shape))


@pytest.mark.parametrize("shape", ((1, 1, 1), (70, 130, 200), (140, 300, 72)), ids=str)
def test_bf16(emulated: Any, shape: tuple[int, int, int]) -> None:
    check(emulated, bf16_cases(*shape))


@pytest.mark.parametrize("shape", [(40, 70, 256, 5), (300, 66, 128, 3)], ids=str)
def test_experts(emulated: Any, shape: tuple[int, int, int, int]) -> None:
    check(emulated, expert_cases(*shape))


@pytest.mark.parametrize("path", ["sm89", "sm90"])
def test_sums_of_fp8_are_added_in_fp32_every_128_columns(
    emulated: Any, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """Of like products, sums lose at most 2^-13 of what they are after each 32 columns: 2.5 * 2^-13 of the whole. In 14
    bits over the 1500 columns of a part of K it is more than three times that.
    """
    monkeypatch.setenv("QUANTKIT_CUDA_GEMM", path)
    random = torch.Generator().manual_seed(1)
    x = torch.rand(70, 24000, generator=random) + 0.5
    weight = (torch.rand(20, 24000, generator=random) * 100 + 50).to(torch.float8_e4m3fn)
    args = (x, ops.pack_fp8(weight), torch.full((20, 1), 0.01), [1, -1], 20, None, [1, -1], None)
    exact, _ = expected_fp8(*args)
    lost = ((emulated("fp8_gemm", args).double() - exact) / exact).abs().max()
    assert 2.0**-16 < lost < 2.5 * 2.0**-13


def test_rows_that_overlap_in_memory(emulated: Any) -> None:
    """Bulk copies are not asked for them."""
    for x in (codes(1, 128).expand(70, 128), codes(1, 69 * 16 + 128).as_strided((70, 128), (16, 1))):
        args = (x, ops.pack_w8a8(codes(20, 128)), 20)
        assert_same("int8_gemm", emulated("int8_gemm", args), ops._library.REFERENCES["int8_gemm"](*args))
        assert torch.ops.quantkit_emulated.largest_block() == 256


@pytest.mark.parametrize(
    ("rows", "path", "threads"), [(64, "", 256), (65, "", 384), (65, "sm80", 256), (1, "sm90", 384)]
)
def test_which_kernels_are_taken(
    emulated: Any, monkeypatch: pytest.MonkeyPatch, rows: int, path: str, threads: int
) -> None:
    monkeypatch.setenv("QUANTKIT_CUDA_GEMM", path)
    emulated("int8_gemm", (codes(rows, 64), ops.pack_w8a8(codes(70, 64)), 70))
    assert torch.ops.quantkit_emulated.largest_block() == threads


def test_a_path_that_is_none(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTKIT_CUDA_GEMM", "sm75")
    with pytest.raises(RuntimeError, match="QUANTKIT_CUDA_GEMM must be sm80, sm89 or sm90, got sm75"):
        emulated("int8_gemm", (codes(2, 8), ops.pack_w8a8(codes(4, 8)), 4))
