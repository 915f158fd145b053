"""rtn_int and rtn_fp8: the results of the separate ops, whichever way the kernel cuts the matrix."""

from __future__ import annotations

import pytest
import torch

from .cpu_cases import BLOCKS, FLOATS, FP8, KINDS, check, check_compiles, check_refused, matrices, matrix


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_int_like_the_reference(dtype: torch.dtype, kind: str) -> None:
    for x in matrices(dtype, kind):
        for block in BLOCKS:
            check("rtn_int", x, block, -127, 127, True, 127.0, torch.float32, 0)
            check("rtn_int", x, block, -128, 127, False, 0.0, torch.float32, 8)
            check("rtn_int", x, block, -8, 7, True, 7.5, torch.bfloat16, 4)
            check("rtn_int", x, block, -8, 7, False, 0.0, torch.float16, 4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_fp8_like_the_reference(dtype: torch.dtype, kind: str) -> None:
    for x in matrices(dtype, kind):
        for block in BLOCKS:
            for fp8 in FP8:
                check("rtn_fp8", x, block, fp8)


@pytest.mark.parametrize("block", [[1, -1], [1, 128], [128, 128], [64, 3], [-1, -1], [-1, 1], [300, 7]])
def test_larger_than_a_tile(block: list[int]) -> None:
    x = matrix(700, 3001, torch.bfloat16, "normal")
    check("rtn_int", x, block, -8, 7, True, 7.5, torch.bfloat16, 4)
    check("rtn_int", x[:, 3:], block, -128, 127, False, 0.0, torch.float32, 0)
    check("rtn_fp8", x, block, torch.float8_e4m3fn)


def test_every_16_bit_pattern_with_its_neighbours() -> None:
    """Each row holds one power of two of magnitudes, so that the scale fits them: what the fused encoder relies on."""
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).reshape(-1, 256)
        for fp8 in FP8:
            check("rtn_fp8", x, [1, -1], fp8)
        check("rtn_int", x, [1, -1], -127, 127, True, 127.0, torch.float32, 0)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty(shape: tuple[int, int], block: list[int]) -> None:
    check("rtn_int", torch.zeros(shape), block, -8, 7, False, 0.0, torch.float32, 4)
    check("rtn_fp8", torch.zeros(shape), block, torch.float8_e4m3fn)


def test_refuses() -> None:
    x, how = torch.ones(4, 6), (True, 7.5, torch.float32)
    check_refused("rtn_int", r"must fit int8, got \[7, -8\]", x, [1, -1], 7, -8, *how, 0)
    check_refused("rtn_int", "pack_bits must be 0, 4 or 8, got 2", x, [1, -1], -8, 7, *how, 2)
    check_refused("rtn_int", "scale_dtype must be", x, [1, -1], -8, 7, True, 7.5, torch.float64, 0)
    check_refused("rtn_int", "block sizes must be positive", x, [1, -2], -8, 7, *how, 0)
    check_refused("rtn_fp8", "x must be float32, float16 or bfloat16", x.double(), [1, -1], torch.float8_e5m2)
    check_refused("rtn_fp8", "dtype must be float8_e4m3fn or float8_e5m2", x, [1, -1], torch.float16)


def test_compiles() -> None:
    x = torch.randn(5, 70, dtype=torch.bfloat16)
    check_compiles("rtn_int", x, [1, 32], -8, 7, True, 7.5, torch.bfloat16, 4)
    check_compiles("rtn_int", x, [1, -1], -128, 127, False, 0.0, torch.float32, 0)
    check_compiles("rtn_fp8", x, [2, 32], torch.float8_e4m3fn)
