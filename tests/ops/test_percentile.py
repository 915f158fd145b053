"""percentile_scale: an exact order statistic of every block."""

from __future__ import annotations

import pytest
import torch

import quantkit.ops as ops

from .cpu_cases import BLOCKS, FLOATS, check, check_compiles, check_refused, matrices, matrix

HOW = ((-8, 7, True, 7.5, torch.bfloat16), (-127, 127, True, 127.0, torch.float32), (-8, 7, False, 0.0, torch.float16))


@pytest.mark.parametrize("dtype", FLOATS)
def test_is_the_reference(dtype: torch.dtype) -> None:
    for kind in ("normal", "zero rows", "tiny", "huge"):
        if dtype == torch.float16 and kind == "huge":
            continue  # beyond its range
        for x in matrices(dtype, kind):
            for i, block in enumerate(BLOCKS):
                for percentile in (99.99, 90.0, 33.3, 1e-9, 100.0):
                    check("percentile_scale", x, block, percentile, *HOW[i % 3])
    x = torch.arange(-32768, 32768).to(torch.int16).view(dtype if dtype != torch.float32 else torch.bfloat16)
    x = x[x.isfinite()].to(dtype).reshape(1, -1)  # every number of 16 bits
    for percentile in (0.01, 12.5, 60.0, 99.9):
        for how in HOW[1:]:
            check("percentile_scale", x, [1, -1], percentile, *how)
            check("percentile_scale", x, [1, 100], percentile, *how)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    for block in BLOCKS:
        check("percentile_scale", torch.zeros(shape), block, 99.0, *HOW[2])
        check("percentile_scale", torch.zeros(shape), block, 99.0, *HOW[0])


def test_percentile_is_an_order_statistic() -> None:
    x = torch.randperm(1000).float().reshape(10, 100) + 1
    found, _ = ops.percentile_scale(x, [-1, -1], percentile=99.0, q_min=-8, q_max=7, divisor=1.0)
    assert found.item() == 990
    found, _ = ops.percentile_scale(
        x.bfloat16() - 500, [-1, -1], percentile=100.0, q_min=-128, q_max=127, symmetric=False
    )
    low, high = ops.minmax(x.bfloat16() - 500, [-1, -1])
    assert torch.equal(found, ops.asymmetric_scale(low, high, -128, 127)[0])
    x[3, 3] = float("nan")
    with pytest.raises(RuntimeError, match="quantkit::percentile_scale: x must be finite"):
        ops.percentile_scale(x, [1, 7], q_min=-8, q_max=7, divisor=7.5)


def test_refuses() -> None:
    x = torch.ones(4, 6)
    for bad in (float("nan"), float("inf"), -float("inf")):
        y = x.clone()
        y[2, 3] = bad
        for how in HOW:
            check_refused("percentile_scale", "quantkit::percentile_scale: x must be finite", y, [1, 3], 99.0, *how)
    check_refused("percentile_scale", r"percentile must be in \(0, 100\], got 0", x, [1, 3], 0.0, *HOW[0])
    check_refused("percentile_scale", "divisor must be positive", x, [1, 3], 9.0, -8, 7, True, 0.0, torch.float32)


def test_compiles() -> None:
    check_compiles("percentile_scale", matrix(5, 70, torch.bfloat16, "normal"), [1, 32], 90.0, *HOW[0])
    check_compiles("percentile_scale", matrix(5, 70, torch.float32, "normal"), [-1, -1], 90.0, *HOW[2])
