"""mse_scale: the candidate that wins errs least in fp64, up to what fp32 sums can tell apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import quantkit.ops as ops
from quantkit.ops.search import _mse_candidates, _mse_errors

from .cpu_cases import BLOCKS, FLOATS, call, check, check_compiles, check_refused, matrices, matrix

HOW = ((-8, 7, True, 7.5, torch.bfloat16), (-127, 127, True, 127.0, torch.float32), (-8, 7, False, 0.0, torch.float16))
# 64 fp32 additions a lane and the power's polynomials, over the reference's sum (relative): see `power`. 8-bit codes
# without FMA lose up to 2^-24 * 127 of a step in each difference, of random sign.
BOUND = 2e-5


def assert_least(x: Tensor, block: list[int], importance: Tensor | None, how: tuple, norm: float, *grid: Any) -> None:
    scale, zero = call("mse_scale", x, block, importance, *how, norm, *grid)
    scales, zeros = _mse_candidates(x, block, *how, *grid)
    errors = _mse_errors(x, block, importance, scales, zeros, how[0], how[1], norm)
    same = scales == scale
    if not how[2]:
        same &= zeros == zero
    assert same.any(0).all(), "a result that is no candidate"
    mine = torch.where(same, errors, float("inf")).amin(0)
    assert (mine <= errors.amin(0) * (1 + BOUND) + 1e-30).all(), (mine / errors.amin(0)).max()


@pytest.mark.parametrize("norm", [2.0, 2.4, 1.0])
@pytest.mark.parametrize("dtype", FLOATS)
def test_least_error(dtype: torch.dtype, norm: float) -> None:
    for kind in ("normal", "zero rows", "tiny", "huge") if norm == 2.4 else ("normal",):
        if kind != "normal" and dtype == torch.float16:
            continue  # beyond its range
        for x in matrices(dtype, kind):
            importance = torch.rand(x.shape[1], generator=torch.Generator().manual_seed(1)) * 1e20
            for i, block in enumerate(BLOCKS if kind == "normal" else BLOCKS[::5]):
                how = HOW[i % 3] if kind == "normal" else HOW[1]
                assert_least(x, block, importance if i % 2 else None, how, norm, 0.2, 20)


def test_wide_search_of_outliers() -> None:
    """Ranges that really shrink: one value of each group is far out."""
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(2))
    x[:, ::128] *= 4
    for how in HOW:
        for norm in (2.0, 2.4):
            assert_least(x, [1, 128], None, how, norm, 0.8, 50)
    scale, _ = ops.mse_scale(x, [1, 128], q_min=-8, q_max=7, divisor=7.5, search_range=0.8, search_steps=50)
    assert (scale < ops.symmetric_scale(ops.absmax(x, [1, 128]), 7.5)).float().mean() > 0.9


@pytest.mark.parametrize("norm", [2.0, 2.4])
def test_signs(norm: float) -> None:
    how = (-8, 7, True, 7.5, torch.float32)
    for block in ([1, 32], [1, -1], [-1, -1], [40, -1], [3, 5]):
        for dtype in FLOATS:
            for x in matrices(dtype, "normal"):
                assert_least(x, block, None, how, norm, 0.2, 20, True)
    x = torch.tensor([[8.0, 1, 2, 3, 4, 5, 6, 7]])
    for sign in (1.0, -1.0):  # without loss: the code -8 stands for the largest
        scale, zero = ops.mse_scale(sign * x, [1, -1], q_min=-8, q_max=7, norm=norm, signs=True)
        assert scale.item() == -sign and zero.numel() == 0
        assert torch.equal(ops.quantize_int(sign * x, scale, None, [1, -1], -8, 7).float() * scale, sign * x)
    scale, _ = ops.mse_scale(torch.tensor([[-3.0, 3.0]]), [1, -1], q_min=-8, q_max=7, search_steps=0, signs=True)
    assert scale.item() == 3.0 / 8  # the positive one of equals
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(3))
    plain = ops.mse_scale(x, [1, 128], q_min=-8, q_max=7, divisor=8.0, norm=norm)[0]
    scale = ops.mse_scale(x, [1, 128], q_min=-8, q_max=7, norm=norm, signs=True)[0]
    assert 0.2 < (scale < 0).float().mean() < 0.8 and bool((plain[scale > 0] == scale[scale > 0]).all())


def test_threads_change_nothing() -> None:
    x = torch.randn(300, 700, generator=torch.Generator().manual_seed(4))
    threads, found = torch.get_num_threads(), []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        found += [[ops.mse_scale(x, block, q_min=-8, q_max=7, divisor=7.5)[0] for block in ([-1, -1], [-1, 7])]]
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_importance_decides() -> None:
    """Where only the largest element counts, nothing is clipped; where it does not, the range closes."""
    x = torch.tensor([[8.0, 0.33, -0.41, 0.57, 0.29, -0.71, 0.5, 0.13]])
    first, rest = torch.zeros(8), torch.ones(8)
    first[0], rest[0] = 1.0, 0.0
    args = {"q_min": -8, "q_max": 7, "divisor": 8.0, "search_range": 0.9, "search_steps": 9}
    wide, _ = ops.mse_scale(x, [1, -1], importance=first, **args)
    narrow, _ = ops.mse_scale(x, [1, -1], importance=rest, **args)
    assert narrow.item() < 0.5 * wide.item()


def test_ties_go_to_the_first() -> None:
    x = torch.zeros(3, 40)
    assert ops.mse_scale(x, [1, 8], q_min=-8, q_max=7, divisor=7.5)[0].eq(2.0**-100).all()
    x = matrix(5, 70, torch.float32, "normal")
    for how in HOW:  # without steps, or importance: the plain range
        plain = call("mse_scale", x, [1, 32], None, *how, 2.4, 0.2, 0)
        assert torch.equal(plain[0], call("mse_scale", x, [1, 32], torch.zeros(70), *how, 2.4, 0.2, 20)[0])
        check("mse_scale", x, [1, 32], None, *how, 2.0, 0.0, 5)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    for block in BLOCKS:
        check("mse_scale", torch.zeros(shape), block, None, *HOW[2], 2.4, 0.2, 20)


def test_refuses() -> None:
    x, grid = torch.ones(4, 6), (2.4, 0.2, 20)
    for bad in (float("nan"), float("inf"), -float("inf")):
        y = x.clone()
        y[2, 3] = bad
        for how in HOW:
            check_refused("mse_scale", "quantkit::mse_scale: x must be finite", y, [1, 3], None, *how, *grid)
        check_refused("mse_scale", "importance must be finite and not negative", x, [1, 3], y[2], *HOW[0], *grid)
    check_refused("mse_scale", r"importance must be float32 \[6\]", x, [1, 3], x[0, :3], *HOW[0], *grid)
    check_refused("mse_scale", r"norm must be above 0 and at most 8, got 0", x, [1, 3], None, *HOW[0], 0.0, 0.2, 20)
    check_refused("mse_scale", r"search_range must be in \[0, 1\), got 1", x, [1, 3], None, *HOW[0], 2.4, 1.0, 20)
    check_refused("mse_scale", "search_steps must be 0 to 1000, got -1", x, [1, 3], None, *HOW[0], 2.4, 0.2, -1)
    for how in (HOW[2], (0, 7, True, 7.0, torch.float32)):
        check_refused("mse_scale", "signs are for symmetric codes with a", x, [1, 3], None, *how, *grid, True)
    check_refused("mse_scale", "divisor must be positive", x, [1, 3], None, -8, 7, True, 0.0, torch.float32, *grid)


def test_compiles() -> None:
    x = torch.randn(5, 70, dtype=torch.bfloat16)
    check_compiles("mse_scale", x, [1, 32], torch.rand(70), *HOW[0], 2.0, 0.2, 20)
    check_compiles("mse_scale", x, [1, -1], None, *HOW[2], 2.0, 0.2, 20)
    check_compiles("mse_scale", torch.randn(5, 70), [1, -1], None, *HOW[0], 2.4, 0.2, 20, True)  # no two alike
