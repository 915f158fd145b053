"""The CUDA ops of the calibrated algorithms on a device: results, streams, the same bits every time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import quantkit.ops as ops

from .calibrated_cases import (
    OPS,
    assert_gram,
    assert_least,
    assert_losses,
    assert_smooth,
    awq_cases,
    gram_cases,
    histogram_cases,
    histogram_scale_cases,
    inputs,
    mse_cases,
    percentile_cases,
    smooth_cases,
    sweep_cases,
)
from .cuda_cases import BLOCKS, FLOATS, SHAPES, assert_same, matrix, relocate, results
from .device import call, check_graph, check_other_device

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("cuda_kernels")]


def cpu(op: str, args: tuple[Any, ...]) -> Any:
    copies = [relocate(arg, lambda t: t.clone()) for arg in args]
    return results(op, getattr(torch.ops.quantkit, op)(*copies), copies)


@pytest.mark.parametrize("shape", [(1, 1), (33, 128), (70, 260), (300, 500), (1000, 512)], ids=str)
def test_sweep(shape: tuple[int, int]) -> None:
    for args in sweep_cases(*shape):
        assert_same("gptq_sweep", call("gptq_sweep", args), cpu("gptq_sweep", args))


@pytest.mark.parametrize("shape", [(300, 1000), (1000, 2048)], ids=str)
def test_wide_sweep(shape: tuple[int, int]) -> None:
    """Where the CPU may sum bf16 numbers, only the losses are the same."""
    for args in sweep_cases(*shape):
        got, wanted = (f("gptq_sweep", args)[-1].cpu().sum() for f in (call, cpu))
        torch.testing.assert_close(got, wanted, rtol=0.02, atol=0)


@pytest.mark.parametrize("shared", [False, True])
def test_sweep_of_a_batch(shared: bool) -> None:
    for args in sweep_cases(150, 400, batch=5, shared=shared):
        assert_same("gptq_sweep", call("gptq_sweep", args), cpu("gptq_sweep", args))


def test_sweep_refuses() -> None:
    args = list(next(sweep_cases(40, 200)))
    args[0][3, 150] = torch.nan
    with pytest.raises(RuntimeError, match="gptq_sweep: w holds NaN or infinities"):
        call("gptq_sweep", tuple(args))


@pytest.mark.parametrize("shape", [(1, 1), (50, 130), (64, 260), (2000, 1000), (9000, 640), (4096, 2048)], ids=str)
def test_gram(shape: tuple[int, int]) -> None:
    for args in gram_cases(*shape):
        assert_gram(tuple(t.cpu() for t in call("gram_accumulate", args)), args)


@pytest.mark.parametrize("shape", [(1, 1), (135, 140), (40, 264), (500, 1000), (1024, 2048)], ids=str)
def test_awq(shape: tuple[int, int]) -> None:
    for args in awq_cases(*shape):
        assert_losses(call("awq_search", args), args)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_mse(block: list[int]) -> None:
    for i, shape in enumerate(SHAPES):
        x = matrix(*shape, FLOATS[i % 3], i).nan_to_num(1.0, 2.0, -3.0).clamp(-100, 100)
        for args in mse_cases(x, block):
            assert_least(call("mse_scale", args), args)


def test_smooth() -> None:
    for args in smooth_cases():
        assert_smooth(call("smoothquant_scales", args), args)


def test_histogram() -> None:
    for args in histogram_cases():
        counts, span = args[2].clone(), args[3].clone()
        ops._library.REFERENCES["histogram_accumulate"](args[0], args[1], counts, span)
        assert_same("histogram_accumulate", call("histogram_accumulate", args), (counts, span))


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_percentile(block: list[int]) -> None:
    for i, shape in enumerate((*SHAPES, (700, 400))):
        x = matrix(*shape, FLOATS[i % 3], i).nan_to_num(1.0, 2.0, -3.0).clamp(-6e4, 6e4)
        for args in percentile_cases(x, block):
            assert_same("percentile_scale", call("percentile_scale", args), cpu("percentile_scale", args))


def test_percentile_of_a_large_matrix() -> None:
    for dtype in FLOATS:
        x = (torch.randn(2048, 4100) * torch.exp(torch.randn(2048, 1))).to(dtype)
        for block in ([-1, -1], [1, -1], [1, 128], [512, -1]):
            for args in list(percentile_cases(x, block))[:3]:
                assert_same("percentile_scale", call("percentile_scale", args), cpu("percentile_scale", args))


def test_histogram_scale() -> None:
    """Powers and logarithms are a device's own, but no loss moves by as much as two that count as equal may differ."""
    for args in histogram_scale_cases():
        assert_same("histogram_scale", call("histogram_scale", args), cpu("histogram_scale", args))


def test_factor_by_torch() -> None:
    g = inputs(8, 300)[1]
    torch.testing.assert_close(ops.gptq_factor(g.cuda())[0].cpu(), ops.gptq_factor(g)[0], rtol=1e-3, atol=1e-5)


def test_scales_in_a_graph() -> None:
    """The two that do not wait for the device."""
    x = matrix(300, 600, torch.bfloat16).nan_to_num(1.0, 2.0, -3.0)
    cases = [("percentile_scale", args) for b in ([-1, -1], [1, 128]) for args in percentile_cases(x, b)]
    cases += [("histogram_scale", args) for args in histogram_scale_cases()]
    check_graph(cases[::5], cpu)


def one_of_each() -> list[tuple[str, tuple[Any, ...]]]:
    x = matrix(130, 264, torch.bfloat16).nan_to_num(1.0, 2.0, -3.0).clamp(-100, 100)
    found = [
        ("gptq_sweep", next(sweep_cases(130, 264))),
        ("gram_accumulate", next(gram_cases(130, 264))),
        ("awq_search", next(awq_cases(130, 264))),
        ("smoothquant_scales", list(smooth_cases())[-1]),
        ("mse_scale", next(mse_cases(x, [1, 128]))),
        ("histogram_accumulate", (x, None, torch.zeros(8192, dtype=torch.int64), torch.zeros(1))),
        ("percentile_scale", next(percentile_cases(x, [1, 128]))),
        ("histogram_scale", next(histogram_scale_cases())),
    ]
    assert {op for op, _ in found} == OPS
    return found


def same_bits(op: str, got: Any, wanted: Any) -> None:
    many = isinstance(wanted, (tuple, list))
    for one, other in zip(got if many else (got,), wanted if many else (wanted,), strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), op


def test_runs_on_the_current_stream() -> None:
    stream = torch.cuda.Stream()
    for op, args in one_of_each():
        wanted = call(op, args)
        placed = [relocate(arg, lambda t: t.cuda()) for arg in args]
        late = [torch.zeros_like(a) if isinstance(a, Tensor) else a for a in placed]
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # an op on another stream would read the zeros
            for source, target in zip(placed, late, strict=True):
                if isinstance(source, Tensor):
                    target.copy_(source)
            got = results(op, getattr(torch.ops.quantkit, op)(*late), late)
        stream.synchronize()
        same_bits(op, got, wanted)


def test_same_bits_every_time() -> None:
    for op, args in one_of_each():
        first = call(op, args)
        for _ in range(5):
            same_bits(op, call(op, args), first)


def test_other_device() -> None:
    check_other_device(one_of_each())
