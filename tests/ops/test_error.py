"""quantization_error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .cpu_cases import (
    BLOCKS,
    FLOATS,
    FP8,
    KINDS,
    call,
    check,
    check_compiles,
    check_refused,
    matrices,
    matrix,
    reference,
)


def quantized(x: Tensor, block: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    low, high = reference("minmax", x, block)
    scale, zero_point = reference("asymmetric_scale", low.nan_to_num(-1), high.nan_to_num(1), -128, 127, torch.float32)
    return reference("quantize_int", x, scale, zero_point, block, -128, 127), scale, zero_point


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_like_the_reference(dtype: torch.dtype, kind: str) -> None:
    for x in matrices(dtype, kind):
        for block in BLOCKS:
            q, scale, zero_point = quantized(x, block)
            check("quantization_error", x, q, scale, zero_point, block)
            check("quantization_error", x, q, scale, None, block)
            for fp8 in FP8:
                check("quantization_error", x, reference("quantize_fp8", x, scale, block, fp8), scale, None, block)


def test_threads_leave_no_trace() -> None:
    x = matrix(300, 500, torch.bfloat16, "normal")
    q, scale, zero_point = quantized(x, [1, 128])
    wanted = call("quantization_error", x, q, scale, zero_point, [1, 128])
    threads = torch.get_num_threads()
    try:
        for n in (1, 3, 7):
            torch.set_num_threads(n)
            assert torch.equal(call("quantization_error", x, q, scale, zero_point, [1, 128]), wanted)
    finally:
        torch.set_num_threads(threads)


def test_nan_propagates_into_what_it_touches() -> None:
    x, scale, block = torch.ones(2, 40), torch.ones(2, 1), [1, -1]
    q = torch.ones(2, 40).to(torch.float8_e4m3fn)
    assert call("quantization_error", x, q, scale, None, block).tolist() == [0.0, 80.0, 0.0, 1.0]
    q[1, 39] = float("nan")
    error, source, most_error, most_source = call("quantization_error", x, q, scale, None, block)
    assert error.isnan() and most_error.isnan() and source == 80 and most_source == 1
    x[0, 3] = float("nan")
    assert call("quantization_error", x, q, scale, None, block).isnan().all()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty_is_zero(shape: tuple[int, int]) -> None:
    x = torch.zeros(shape)
    scale = reference("absmax", x, [1, -1])
    assert call("quantization_error", x, x.to(torch.int8), scale, None, [1, -1]).tolist() == [0.0] * 4


def test_refuses() -> None:
    x, scale, block = torch.ones(4, 6), torch.ones(4, 1), [1, -1]
    codes = x.to(torch.int8)
    check_refused("quantization_error", r"q \[4, 5\] must have x's shape \[4, 6\]", x, codes[:, :5], scale, None, block)
    check_refused("quantization_error", "q must be int8", x, x, scale, None, block)
    check_refused("quantization_error", "x must be float32", x.double(), codes, scale, None, block)


def test_compiles() -> None:
    q = torch.ones(5, 70, dtype=torch.int8)
    check_compiles("quantization_error", torch.randn(5, 70), q, torch.rand(5, 3), None, [1, 32])
