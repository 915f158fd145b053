"""The CUDA kernels of the calibrated algorithms, run on the CPU: the bits of the CPU kernels where the order of
operations is theirs, else within a bound that follows from the number formats."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import quantkit.ops as ops

from . import emulated_cuda
from .calibrated_cases import assert_gram, assert_losses, awq_cases, gram_cases, sweep_cases
from .cuda_cases import assert_same

pytestmark = pytest.mark.skipif(emulated_cuda.compiler() is None, reason="no C++ compiler: set CXX")


def same_as_cpu(emulated: Any, op: str, args: tuple[Any, ...]) -> None:
    assert_same(op, emulated(op, args), getattr(torch.ops.quantkit, op)(*args))


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (33, 128), (40, 200), (70, 260), (5, 300)], ids=str)
def test_sweep(emulated: Any, shape: tuple[int, int]) -> None:
    for args in sweep_cases(*shape):
        same_as_cpu(emulated, "gptq_sweep", args)


@pytest.mark.parametrize("shared", [False, True])
def test_sweep_of_a_batch(emulated: Any, shared: bool) -> None:
    for args in sweep_cases(35, 140, batch=3, shared=shared):
        same_as_cpu(emulated, "gptq_sweep", args)


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0, 3, 8)], ids=str)
def test_sweep_of_nothing(emulated: Any, shape: tuple[int, ...]) -> None:
    args = (torch.empty(shape), torch.eye(shape[-1]), None, None, 4, -8, 7, True, 7.5, torch.float32, None, 0.0, 0)
    same_as_cpu(emulated, "gptq_sweep", args)


@pytest.mark.parametrize(
    ("which", "place", "value", "words"),
    [
        (0, (2, 3), float("inf"), "w holds NaN or infinities"),
        (1, (3, 9), float("nan"), "the loss is not finite"),
        (1, (7, 7), 0.0, "u's diagonal must be positive"),
    ],
)
def test_sweep_refuses(emulated: Any, which: int, place: tuple[int, int], value: float, words: str) -> None:
    args = list(next(sweep_cases(4, 40)))
    args[which] = args[which].clone()
    args[which][place] = value
    for call in (emulated, lambda op, args: getattr(torch.ops.quantkit, op)(*args)):
        with pytest.raises(RuntimeError, match=f"quantkit::gptq_sweep: {words}"):
            call("gptq_sweep", tuple(args))


def test_sweep_refuses_groups_that_are_not_there(emulated: Any) -> None:
    g_idx = torch.tensor([0, 1, 2, 0], dtype=torch.int32)
    args = (torch.ones(2, 4), torch.eye(4), torch.ones(2, 2), None, 2, -8, 7, True, 7.5, torch.float32, g_idx, 0.0, 0)
    with pytest.raises(RuntimeError, match="quantkit::gptq_sweep: g_idx must lie"):
        emulated("gptq_sweep", args)
    assert "gptq_sweep" in ops._library.compiled_ops("CUDA")


@pytest.mark.parametrize("shape", [(1, 1), (7, 24), (50, 130), (33, 136), (64, 260)], ids=str)
def test_gram(emulated: Any, shape: tuple[int, int]) -> None:
    for args in gram_cases(*shape):
        assert_gram(emulated("gram_accumulate", args), args)


def test_gram_of_numbers_that_have_no_rounding(emulated: Any) -> None:
    """Whole numbers: every order of summation gives the same bits, the CPU's."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = torch.randint(-8, 9, (100, 200), generator=generator).to(dtype)
        channels = torch.tensor([[torch.inf], [-torch.inf], [0.0]]).repeat(1, 200)
        args = (x, torch.arange(100) % 3 > 0, torch.zeros(200, 200), channels)
        wanted = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
        torch.ops.quantkit.gram_accumulate(*wanted)
        assert_same("gram_accumulate", emulated("gram_accumulate", args), tuple(wanted[2:]))


def test_gram_of_many_tokens(emulated: Any) -> None:
    """More than one launch takes: none is lost or counted twice."""
    x = torch.ones(8192 + 40, 8, dtype=torch.bfloat16)
    mask = torch.zeros(len(x), dtype=torch.bool)
    mask[8190:8200] = True
    assert (emulated("gram_accumulate", (x, mask, torch.zeros(8, 8), None))[0] == 10).all()
    assert (emulated("gram_accumulate", (x, None, torch.zeros(8, 8), None))[0] == len(x)).all()


def test_gram_shows_what_is_not_finite(emulated: Any) -> None:
    for value in (float("nan"), float("inf")):
        x = torch.ones(20, 140)
        x[3, 130] = value
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            channels = torch.tensor([[torch.inf], [-torch.inf], [0.0]]).repeat(1, 140)
            g, found = emulated("gram_accumulate", (x.to(dtype), None, torch.zeros(140, 140), channels))
            assert not g[130, 130].isfinite() and g[:130, :130].isfinite().all()
            assert found.isfinite().sum() == 3 * 140 - (3 if value != value else 2)
            assert value == value or found[:, 130].isnan().all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (20, 130), (135, 140), (40, 264)], ids=str)
def test_awq(emulated: Any, shape: tuple[int, int]) -> None:
    for args in awq_cases(*shape):
        assert_losses(emulated("awq_search", args), args)


def test_awq_of_nothing(emulated: Any) -> None:
    for rows, cols, candidates in ((0, 8, 2), (3, 0, 2), (3, 8, 0)):
        w, g, scales = torch.ones(rows, cols), torch.eye(cols), torch.ones(candidates, cols)
        args = (w, g, scales, [1.0, 0.5], 4, -8, 7, True, 7.5, torch.float32)
        assert_same("awq_search", emulated("awq_search", args), torch.zeros(candidates, 2))
