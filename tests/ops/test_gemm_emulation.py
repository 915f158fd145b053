"""The CUDA GEMMs, kernels and torch boundary, run on the CPU: integers bit for bit, floats within derived bounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import quantkit.ops as ops

from . import emulated_cuda
from .gemm_cases import (
    DEEP,
    GROUPED,
    OPS,
    SHAPES,
    bf16_cases,
    check,
    codes,
    expert_cases,
    fp8_cases,
    int8_cases,
    int8_expert_cases,
    scales,
    tokens,
    w4a8_cases,
    wna16_cases,
)

pytestmark = [
    pytest.mark.skipif(emulated_cuda.compiler() is None, reason="no C++ compiler: set CXX"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(autouse=True)
def base_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of sm_80; test_gemm_sm90_emulation.py asks the others."""
    monkeypatch.setenv("QUANTKIT_CUDA_GEMM", "sm80")


@pytest.mark.parametrize("shape", (*SHAPES, *DEEP), ids=str)
def test_int8(emulated: Any, shape: tuple[int, int, int]) -> None:
    check(emulated, int8_cases(*shape))


@pytest.mark.parametrize("shape", [(1, 40, 64, 3), (40, 70, 132, 5), (200, 66, 40, 34), (150, 64, 64, 2)], ids=str)
def test_int8_experts(emulated: Any, shape: tuple[int, int, int, int]) -> None:
    check(emulated, int8_expert_cases(*shape))


@pytest.mark.parametrize("shape", GROUPED, ids=str)
def test_wna16(emulated: Any, shape: tuple[int, int, int]) -> None:
    check(emulated, wna16_cases(*shape))


@pytest.mark.parametrize("shape", (*SHAPES, *DEEP), ids=str)
def test_bf16(emulated: Any, shape: tuple[int, int, int]) -> None:
    check(emulated, bf16_cases(*shape))


@pytest.mark.parametrize("shape", GROUPED, ids=str)
def test_w4a8(emulated: Any, shape: tuple[int, int, int]) -> None:
    check(emulated, w4a8_cases(*shape))


@pytest.mark.parametrize("shape", (*SHAPES, *GROUPED), ids=str)
def test_fp8(emulated: Any, shape: tuple[int, int, int]) -> None:
    check(emulated, fp8_cases(*shape))


@pytest.mark.parametrize("shape", GROUPED, ids=str)
def test_fp8_by_codes(emulated: Any, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int]) -> None:
    """By mma of e4m3, as from sm_89 on."""
    monkeypatch.setenv("QUANTKIT_CUDA_GEMM", "sm89")
    check(emulated, fp8_cases(*shape))


@pytest.mark.parametrize("shape", [(1, 40, 128, 3), (40, 70, 256, 5), (150, 66, 128, 34)], ids=str)
def test_experts(emulated: Any, shape: tuple[int, int, int, int]) -> None:
    check(emulated, expert_cases(*shape))


def test_int8_without_depth(emulated: Any) -> None:
    packed = ops.pack_w8a8(torch.empty(9, 0, dtype=torch.int8))
    x, bias = torch.empty(3, 0), torch.arange(9.0)
    assert torch.equal(emulated("w8a8_gemm", (x, packed, scales(9), 9, None, None, True, bias)), bias.expand(3, 9))
    assert not emulated("int8_gemm", (torch.empty(3, 0, dtype=torch.int8), packed, 9)).any()


def test_int8_at_its_limits(emulated: Any) -> None:
    """Sums next to 2^31, and codes of -128 on both sides."""
    a = torch.full((2, 2048), -128, dtype=torch.int8)
    w = torch.full((3, 2048), -128, dtype=torch.int8)
    w[1] = 127
    assert emulated("int8_gemm", (a, ops.pack_w8a8(w), 3))[0].tolist() == [2048 * 16384, -2048 * 16256, 2048 * 16384]


@pytest.mark.parametrize(("rows", "cols"), [(0, 8), (4, 0), (0, 0)])
def test_empty(emulated: Any, rows: int, cols: int) -> None:
    packed = ops.pack_w8a8(codes(cols, 16))
    x = tokens(rows, 16, torch.bfloat16)
    for op, args in (
        ("int8_gemm", (codes(rows, 16), packed, cols)),
        ("w8a8_gemm", (x, packed, scales(cols), cols, None, None, True, None)),
        ("int8_mixed_gemm", (x, packed, scales(cols), cols, 6.0, None)),
    ):
        assert emulated(op, args).shape == (rows, cols)


def test_every_gemm_is_here() -> None:
    assert {op for op in ops._library.compiled_ops("CUDA") if op.endswith("_gemm")} == OPS


@pytest.mark.parametrize(
    ("op", "args", "words"),
    [
        ("int8_gemm", (torch.ones(2, 4), torch.zeros(1, 512, dtype=torch.int8), 4), r"a must be torch.int8 \[M, K\]"),
        ("int8_gemm", (codes(2, 8), ops.pack_w8a8(codes(4, 4)), 4), "packed must be what pack_w8a8 makes of int8"),
        (
            "w8a8_gemm",
            (torch.ones(2, 4), ops.pack_w8a8(codes(4, 4)), scales(3), 4, None, None, True, None),
            r"weight_scale must be torch.float32 \[4\] or \[1\]",
        ),
        (
            "w8a8_gemm",
            (torch.ones(4, 4).t()[:, ::2], ops.pack_w8a8(codes(4, 2)), scales(4), 4, None, None, True, None),
            "x must have its last dimension contiguous",
        ),
        (
            "int8_mixed_gemm",
            (torch.ones(2, 4), ops.pack_w8a8(codes(4, 4)), scales(4), 4, 0.0, None),
            "threshold must be positive",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(emulated: Any, op: str, args: tuple[Any, ...], words: str) -> None:
    with pytest.raises(RuntimeError, match=f"quantkit::{op}: .*{words}"):
        emulated(op, args)


@pytest.mark.parametrize("offsets", [[0, 9, 3, 400], [-5, 2, 2, 2], [7, 7, 7, 7]], ids=str)
def test_offsets_that_are_none_touch_nothing_else(emulated: Any, offsets: list[int]) -> None:
    """The host does not look at them; the guarded buffers would show an access beyond their ends."""
    packed = torch.stack([ops.pack_w8a8(codes(40, 64))] * 3)
    x = tokens(20, 64, torch.bfloat16)
    for dtype in (torch.int32, torch.int64):
        args = (x, torch.tensor(offsets, dtype=dtype), packed, scales(3, 40), 40, None, None, True, None, None)
        assert emulated("moe_w8a8_gemm", args).shape == (20, 40)
        of_fp8 = torch.stack([ops.pack_fp8(codes(40, 64).to(torch.float8_e4m3fn))] * 3)
        args = (x, args[1], of_fp8, scales(3, 1, 1), 40, [-1, -1], None, [-1, -1], None, None)
        assert emulated("moe_fp8_gemm", args).shape == (20, 40)  # finds the scales of all of an expert's rows


def test_weights_that_do_not_begin_at_16_bytes(library: Any) -> None:
    """Copies of 16 bytes would be a fault that ends a process's use of its device."""
    packed = ops.pack_w8a8(codes(20, 64))
    moved = torch.zeros(packed.numel() + 8, dtype=torch.int8)[8:].view(packed.shape)
    moved.copy_(packed)
    with pytest.raises(RuntimeError, match="int8_gemm: packed must begin at a multiple of 16 bytes"):
        torch.ops.quantkit_emulated.int8_gemm(codes(3, 64), moved, 20)


def test_a_column_that_x_does_not_have(emulated: Any) -> None:
    packed = ops.pack_wna16(ops.pack_int32(codes(8, 64, 4), 4), 4, 64)
    perm = torch.arange(64, dtype=torch.int32)
    perm[5] = 64
    y = emulated("wna16_gemm", (torch.ones(3, 64), packed, scales(8, 1), None, perm, None, 4, 8, -1))
    assert y.isnan().all()
