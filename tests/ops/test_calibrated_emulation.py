"""The CUDA kernels of the calibrated algorithms, run on the CPU: the bits of the CPU kernels where the order of
operations is theirs, else within a bound that follows from the number formats."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import quantkit.ops as ops

from . import emulated_cuda
from .calibrated_cases import (
    assert_gram,
    assert_least,
    assert_losses,
    assert_smooth,
    awq_cases,
    gram_cases,
    histogram_cases,
    histogram_scale_cases,
    mse_cases,
    percentile_cases,
    smooth_cases,
    sweep_cases,
)
from .cuda_cases import BLOCKS, FLOATS, SHAPES, assert_same, matrix, strided

pytestmark = pytest.mark.skipif(emulated_cuda.compiler() is None, reason="no C++ compiler: set CXX")


def same_as_cpu(emulated: Any, op: str, args: tuple[Any, ...]) -> None:
    ops._load.require("cpu")  # the reference rounds products and sums apart
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
    args = (
        torch.empty(shape),
        torch.eye(shape[-1]),
        None,
        None,
        4,
        -8,
        7,
        True,
        7.5,
        torch.float32,
        None,
        0.0,
        0,
        False,
    )
    same_as_cpu(emulated, "gptq_sweep", args)


@pytest.mark.parametrize(
    ("which", "place", "value", "words"),
    [
        (0, (2, 3), float("inf"), "w holds NaN or infinities"),
        (1, (3, 9), float("nan"), "the loss is not finite"),
        (1, (7, 7), 0.0, "factor's diagonal must be positive"),
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
    args = (
        torch.ones(2, 4),
        torch.eye(4),
        torch.ones(2, 2),
        None,
        2,
        -8,
        7,
        True,
        7.5,
        torch.float32,
        g_idx,
        0.0,
        0,
        False,
    )
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


def test_gram_of_tokens_in_parts(emulated: Any) -> None:
    """A small g is summed by several blocks of threads, each with a part of the tokens."""
    for tokens, cols in ((257, 24), (700, 140), (1100, 8)):
        for args in list(gram_cases(tokens, cols))[4::3]:
            assert_gram(emulated("gram_accumulate", args), args)


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


def test_smooth(emulated: Any) -> None:
    for args in smooth_cases():
        assert_smooth(emulated("smoothquant_scales", args), args)


def test_smooth_refuses(emulated: Any) -> None:
    good = torch.ones(40)
    for value in (-1.0, float("nan"), float("inf")):
        bad = good.clone()
        bad[33] = value
        for args, name in (((bad, good, 0.5, 1e-5), "activation"), ((good, bad, 0.5, 1e-5), "weight")):
            with pytest.raises(RuntimeError, match=f"smoothquant_scales: {name} must be finite and not negative"):
                emulated("smoothquant_scales", args)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_mse(emulated: Any, block: list[int]) -> None:
    for i, shape in enumerate(SHAPES[:-1]):
        x = matrix(*shape, FLOATS[i % 3], i).nan_to_num(1.0, 2.0, -3.0).clamp(-100, 100)
        for args in mse_cases(x, block):
            assert_least(emulated("mse_scale", args), args)


def test_mse_of_strides_and_magnitudes(emulated: Any) -> None:
    for x in strided():
        for args in mse_cases(x.nan_to_num(1.0, 2.0, -3.0).clamp(-100, 100), [1, 16]):
            assert_least(emulated("mse_scale", args), args)
    for unit in (1e-42, 1e-30, 1e30, 3e37):
        for args in mse_cases(torch.randn(4, 200) * unit, [1, 64]):
            if args[7] == torch.float16:
                continue  # its scales have no such magnitudes
            assert_least(emulated("mse_scale", args), args)


def test_mse_beyond_registers(emulated: Any) -> None:
    for args in mse_cases(torch.randn(130, 300), [-1, -1]):
        assert_least(emulated("mse_scale", args), args)
    for x, block in ((torch.randn(500, 300), [-1, -1]), (torch.randn(700, 400).bfloat16(), [400, -1])):
        for args in list(mse_cases(x, block))[1:]:
            assert_least(emulated("mse_scale", args), args)
    x[450, 333] = torch.inf
    with pytest.raises(RuntimeError, match="quantkit::mse_scale: x must be finite"):
        emulated("mse_scale", args)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)], ids=str)
def test_mse_of_nothing(emulated: Any, shape: tuple[int, int]) -> None:
    args = (torch.zeros(shape), [1, 4], None, -8, 7, False, 0.0, torch.float32, 2.4, 0.2, 20, False)
    assert_same("mse_scale", emulated("mse_scale", args), ops._library.REFERENCES["mse_scale"](*args))


def test_mse_refuses(emulated: Any) -> None:
    for value in (float("nan"), float("inf"), -float("inf")):
        x = torch.ones(4, 40)
        x[2, 33] = value
        how = (-8, 7, False, 0.0, torch.float32, 2.4, 0.2, 20, False)
        with pytest.raises(RuntimeError, match="quantkit::mse_scale: x must be finite"):
            emulated("mse_scale", (x, [1, 16], None, *how))
        with pytest.raises(RuntimeError, match="mse_scale: importance must be finite and not negative"):
            emulated("mse_scale", (torch.ones(4, 40), [1, 16], x[2], *how))


def test_histogram(emulated: Any) -> None:
    for args in histogram_cases():
        counts, span = args[2].clone(), args[3].clone()
        ops._library.REFERENCES["histogram_accumulate"](args[0], args[1], counts, span)
        assert_same("histogram_accumulate", emulated("histogram_accumulate", args), (counts, span))


def test_histogram_refuses_and_leaves_all_as_it_was(emulated: Any) -> None:
    for value in (float("nan"), float("inf"), -float("inf"), 2.0**127):
        x = torch.ones(30, 40)
        x[21, 33] = value
        guarded = torch.ops.quantkit_emulated.guarded
        counts, span = guarded(torch.arange(8192)), guarded(torch.tensor([0.5]))
        with pytest.raises(RuntimeError, match=r"histogram_accumulate: x must be finite and below 2\^127"):
            torch.ops.quantkit_emulated.histogram_accumulate(guarded(x), None, counts, span)
        assert torch.equal(counts, torch.arange(8192)) and span.item() == 0.5


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_percentile(emulated: Any, block: list[int]) -> None:
    for i, shape in enumerate(SHAPES[:-1]):
        x = matrix(*shape, FLOATS[i % 3], i).nan_to_num(1.0, 2.0, -3.0).clamp(-6e4, 6e4)
        for args in list(percentile_cases(x, block))[i % 4 :: 4]:
            same_as_cpu(emulated, "percentile_scale", args)


def test_percentile_of_strides_and_magnitudes(emulated: Any) -> None:
    for x in strided():
        for args in list(percentile_cases(x.nan_to_num(1.0, 2.0, -3.0), [2, 16]))[1::3]:
            wanted = torch.ops.quantkit.percentile_scale(x.contiguous().nan_to_num(1.0, 2.0, -3.0), *args[1:])
            assert_same("percentile_scale", emulated("percentile_scale", args), wanted)
    for i, dtype in enumerate(FLOATS):
        every = torch.arange(-32768, 32768).to(torch.int16).view(FLOATS[i] if i else torch.bfloat16)
        x = every[every.isfinite()].to(dtype)[torch.randperm(int(every.isfinite().sum()))].reshape(-1, 64)
        for args in list(percentile_cases(x, [10, 64]))[::3]:
            same_as_cpu(emulated, "percentile_scale", args)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_percentile_in_pieces(emulated: Any, dtype: torch.dtype) -> None:
    """Blocks that are too large for a team: counted by all of the device, some bits at a time."""
    x = (torch.randn(500, 300) * torch.exp(torch.randn(500, 1))).to(dtype)
    for args in list(percentile_cases(x, [-1, -1]))[1:4]:
        same_as_cpu(emulated, "percentile_scale", args)
    for args in list(percentile_cases(x.repeat(2, 1)[:998], [499, -1]))[6:8]:
        same_as_cpu(emulated, "percentile_scale", args)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)], ids=str)
def test_percentile_of_nothing(emulated: Any, shape: tuple[int, int]) -> None:
    for args in percentile_cases(torch.zeros(shape), [1, 4]):
        same_as_cpu(emulated, "percentile_scale", args)


@pytest.mark.parametrize("size", [20, 600])
def test_percentile_marks_what_is_not_finite(emulated: Any, size: int) -> None:
    """It does not wait for the device, so it cannot raise: the scale of that block is NaN, the others are as ever."""
    for value in (float("nan"), float("inf"), -float("inf")):
        x = torch.randn(2 * size, 250)
        x[size + 3, 77] = value
        for args in list(percentile_cases(x, [size, -1]))[:2]:
            scale, zero_point = emulated("percentile_scale", args)
            wanted = torch.ops.quantkit.percentile_scale(x[:size], *args[1:])
            assert torch.equal(scale[:1], wanted[0]) and torch.equal(zero_point[:1], wanted[1])
            assert scale[1].isnan().all() and not zero_point[1:].any()


def test_percentile_refuses(emulated: Any) -> None:
    for words, args in (
        ("percentile must be in", (torch.ones(2, 2), [1, 2], 0.0, -8, 7, True, 7.5, torch.float32)),
        ("must hold 0", (torch.ones(2, 2), [1, 2], 9.0, 1, 7, True, 7.5, torch.float32)),
        ("divisor must be positive", (torch.ones(2, 2), [1, 2], 9.0, -8, 7, True, 0.0, torch.float32)),
        ("scale_dtype must be", (torch.ones(2, 2), [1, 2], 9.0, -8, 7, True, 7.5, torch.int8)),
    ):
        with pytest.raises(RuntimeError, match=f"quantkit::percentile_scale: .*{words}"):
            emulated("percentile_scale", args)


def test_histogram_scale(emulated: Any) -> None:
    """The CPU's bits: sums in another order move no loss by as much as two that count as equal may differ."""
    for args in histogram_scale_cases():
        same_as_cpu(emulated, "histogram_scale", args)


def test_histogram_scale_marks_what_it_cannot_use(emulated: Any) -> None:
    counts, span, seen, *_ = next(histogram_scale_cases())
    negative = counts.clone()
    negative[9] = -1
    for method in range(5):
        for codes in ((-8, 7, True, 7.5), (-128, 127, False, 0.0)):
            for some, ends in ((negative, seen), (counts, seen / 0.0), (counts, seen * torch.nan)):
                scale, zero_point = emulated("histogram_scale", (some, span, ends, method, 2.0, *codes))
                assert scale.isnan().all() and not zero_point.any()


def test_histogram_scale_refuses(emulated: Any) -> None:
    counts, span, seen, *_ = next(histogram_scale_cases())
    codes = (-8, 7, True, 7.5)
    for words, args in (
        ("counts must be torch.int64", (counts[1:], span, seen, 0, 99.0, *codes)),
        ("counts must be contiguous", (counts.repeat(2)[::2], span, seen, 0, 99.0, *codes)),
        ("range must be torch.float32", (counts, span, seen[:1], 0, 99.0, *codes)),
        ("method must be 0 to 4", (counts, span, seen, 5, 99.0, *codes)),
        ("percentile must be in", (counts, span, seen, 0, 101.0, *codes)),
        ("the norm of mse", (counts, span, seen, 1, 9.0, *codes)),
        ("a symmetric scale needs", (counts, span, seen, 1, 2.0, 0, 7, True, 7.5)),
    ):
        with pytest.raises(RuntimeError, match=f"quantkit::histogram_scale: {words}"):
            emulated("histogram_scale", args)
