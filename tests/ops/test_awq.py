"""awq_search against fp64, on the codes that rtn_int gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import quantkit.ops as ops

from .cpu_cases import FLOATS, check_refused

INF = float("inf")
RANGES = {4: (-8, 7, 7.5), 8: (-128, 127, 127.5)}
KERNELS = ("kernel", "reference")


def problem(rows: int, cols: int, kind: str = "correlated", count: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, the Gram matrix of an input, and candidates between none and all of its channels' sizes."""
    generator = torch.Generator().manual_seed(rows * 1000 + cols)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x = randn(2 * cols + 64, cols)
    if kind == "correlated":
        x += randn(len(x), 4) @ randn(4, cols)
    elif kind == "loud":  # a few channels, two of them tied to each other
        x[:, :: max(cols // 4, 1)] *= 300.0
        x[:, cols // 3] = 0.7 * x[:, 0] + 0.1 * x[:, cols // 3]
    elif kind == "offset":
        x = 0.3 * x + 2.0 * randn(cols)
    elif kind == "dead":
        x[:, ::3] = 0.0
    sizes = x.abs().mean(0).clamp(min=1e-4)
    scales = torch.stack([sizes.pow(i / count) for i in range(count)])
    # Rows and columns in common, as trained weights have: errors of a bad candidate then are no noise.
    w = 0.02 * (randn(rows, cols) + randn(rows, 3) @ randn(3, cols) + randn(cols))
    return w, x.T @ x, scales


def search(implementation: str, *args: Any) -> Tensor:
    if implementation == "kernel":
        return torch.ops.quantkit.awq_search(*args)
    return ops._library.REFERENCES["awq_search"](*args)


def explicit(
    w: Tensor, g: Tensor, scales: Tensor, clip: list[float], group: int, bits: int, symmetric: bool, dtype: torch.dtype
) -> Tensor:
    """In fp64 but for the codes and their scales, which are the other ops'."""
    q_min, q_max, divisor = RANGES[bits]
    size, cols = w.shape[1] if group == -1 else group, w.shape[1]
    losses = torch.empty(len(scales), len(clip), dtype=torch.float64)
    for i, s in enumerate(scales):
        x, block = w.float() * s, [1, group]
        for j, ratio in enumerate(clip):
            if symmetric:
                step, zero = ops.symmetric_scale(ops.absmax(x, block) * ratio, divisor, dtype), None
            else:
                low, high = ops.minmax(x, block)
                step, zero = ops.asymmetric_scale(low * ratio, high * ratio, q_min, q_max, dtype)
            codes = ops.quantize_int(x, step, zero, block, q_min, q_max)
            if ratio == 1.0:
                how: dict[str, Any] = {"q_min": q_min, "q_max": q_max, "symmetric": symmetric, "divisor": divisor}
                assert torch.equal(codes, ops.rtn_int(x, block, scale_dtype=dtype, **how)[0])
            wide = codes.double()
            if zero is not None:
                wide -= zero.double().repeat_interleave(size, 1)[:, :cols]
            error = wide * step.double().repeat_interleave(size, 1)[:, :cols] / s.double() - w.double()
            losses[i, j] = ((error @ g.double()) * error).sum()
    return losses


def check(
    implementation: str,
    w: Tensor,
    g: Tensor,
    scales: Tensor,
    clip: list[float],
    group: int,
    bits: int = 4,
    symmetric: bool = False,
    dtype: torch.dtype = torch.float32,
) -> None:
    q_min, q_max, divisor = RANGES[bits]
    got = search(implementation, w, g, scales, clip, group, q_min, q_max, symmetric, divisor, dtype)
    wanted = explicit(w, g, scales, clip, group, bits, symmetric, dtype)
    assert got.shape == wanted.shape
    nothing = 1e-9 * float((w.double().square() @ g.double().diagonal()).sum())  # where every weight has a code
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=nothing)
    assert wanted.view(-1)[got.argmin()] <= (1 + 1e-4) * wanted.min() + nothing


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("rows", "cols", "group"),
    [
        (1, 1, -1),
        (5, 7, 3),
        (8, 48, 16),
        (70, 131, 32),
        (255, 131, 32),
        (256, 131, 32),
        (300, 300, 128),
        (259, 97, -1),
        (66, 50, 1),
    ],
)
def test_like_fp64(implementation: str, rows: int, cols: int, group: int, bits: int, symmetric: bool) -> None:
    w, g, scales = problem(rows, cols)
    check(implementation, w, g, scales, [1.0, 0.9], group, bits, symmetric)


@pytest.mark.parametrize("rows", [16, 256, 600])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["plain", "correlated", "loud", "offset", "dead"])
def test_whatever_the_input(kind: str, bits: int, rows: int) -> None:
    w, g, scales = problem(rows, 384, kind, 10)
    check("kernel", w, g, scales, [1.0, 0.8], 128, bits)
    check("kernel", w, g, scales, [1.0], 128, bits, symmetric=True)


def test_many_blocks_of_rows() -> None:
    w, g, scales = problem(500, 1100, count=2)
    check("kernel", w.bfloat16(), g, scales, [1.0], 128)


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes(implementation: str, dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    w, g, scales = problem(260, 160)
    check(implementation, w.to(dtype), g, scales, [1.0], 32, 4, True, scale_dtype)
    check(implementation, w.to(dtype), g, scales, [1.0], 32, 8, False, scale_dtype)


@pytest.mark.parametrize("implementation", KERNELS)
def test_strides(implementation: str) -> None:
    w, g, scales = problem(260, 90)
    wide = [torch.full((len(x) + 1, x.shape[1] + 5), float("nan")) for x in (w, g, scales)]
    parts = [x[: len(y), 3 : 3 + y.shape[1]].copy_(y) for x, y in zip(wide, (w, g, scales), strict=True)]
    check(implementation, *parts, [1.0], 32)


def test_no_smoothing_is_rounding_to_nearest() -> None:
    w, g, _ = problem(300, 256)
    codes, step, _ = ops.rtn_int(w, [1, 64], q_min=-8, q_max=7, divisor=7.5)
    error = ops.dequantize(codes, step, None, [1, 64]).double() - w.double()
    got = ops.awq_search(w, g, torch.ones(1, 256), group_size=64, q_min=-8, q_max=7, divisor=7.5)
    torch.testing.assert_close(got[0, 0].double(), ((error @ g.double()) * error).sum(), rtol=1e-4, atol=0)
    # Powers of two change no code if a whole group shares them.
    same = ops.awq_search(w, g, torch.full((1, 256), 4.0), group_size=64, q_min=-8, q_max=7, divisor=7.5)
    torch.testing.assert_close(same, got, rtol=1e-6, atol=0)


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rows", [10, 300])
def test_what_is_not_finite_never_wins(implementation: str, rows: int, symmetric: bool) -> None:
    w, g, scales = problem(rows, 100, count=6)
    scales[1, 40], scales[2, 41], scales[3, 42], scales[4, 99] = float("nan"), INF, 0.0, -INF
    scales[5] = 1e38
    arguments = (32, -8, 7, symmetric, 7.5)
    losses = search(implementation, w, g, scales, [1.0], *arguments, torch.float32)[:, 0]
    assert losses[0].isfinite()
    assert losses[1:5].eq(INF).all()
    assert not losses.isnan().any()
    assert losses.argmin() in (0, 5)
    # fp16 cannot hold the scales.
    assert search(implementation, w, g, scales[5:], [1.0], *arguments, torch.float16).eq(INF).all()
    for value in (float("nan"), INF, -INF):
        for bad_w, bad_g in ((w.clone(), g), (w, g.clone())):
            target = bad_w if bad_g is g else bad_g
            target[7, 7] = value
            got = search(implementation, bad_w, bad_g, scales[:1], [1.0, 0.5], *arguments, torch.float32)
            assert got.eq(INF).all()


def test_zeros() -> None:
    w, g, scales = problem(270, 64)
    assert ops.awq_search(torch.zeros_like(w), g, scales, group_size=32, q_min=-8, q_max=7, divisor=7.5).eq(0).all()
    assert ops.awq_search(w, torch.zeros_like(g), scales, group_size=32, q_min=-8, q_max=7, divisor=7.5).eq(0).all()


def test_threads_leave_no_trace() -> None:
    w, g, scales = problem(900, 300)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(ops.awq_search(w, g, scales, group_size=128, q_min=-8, q_max=7, symmetric=False))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("shape", [(0, 8, 3, 1), (8, 0, 3, 1), (8, 8, 0, 1), (8, 8, 3, 0)])
def test_empty(implementation: str, shape: tuple[int, int, int, int]) -> None:
    rows, cols, candidates, clips = shape
    arguments = (torch.ones(rows, cols), torch.eye(cols), torch.ones(candidates, cols), [1.0] * clips)
    got = search(implementation, *arguments, -1, -8, 7, False, 7.5, torch.float32)
    assert torch.equal(got, torch.zeros(candidates, clips))


def test_refuses() -> None:
    w, g, scales = torch.ones(4, 8), torch.eye(8), torch.ones(2, 8)
    rest = (-8, 7, True, 7.5, torch.float32)
    check_refused("awq_search", "w must be 2-D", w[0], g, scales, [1.0], 8, *rest)
    check_refused("awq_search", "w must be float32, float16 or bfloat16", w.int(), g, scales, [1.0], 8, *rest)
    check_refused("awq_search", r"g must be torch.float32 \[8, 8\]", w, g[:4], scales, [1.0], 8, *rest)
    check_refused("awq_search", r"scales must be torch.float32 \[candidates, 8\]", w, g, scales[0], [1.0], 8, *rest)
    check_refused("awq_search", r"clip ratios must lie in \(0, 1\]", w, g, scales, [1.0, 0.0], 8, *rest)
    check_refused("awq_search", r"clip ratios must lie in \(0, 1\]", w, g, scales, [1.1], 8, *rest)
    check_refused("awq_search", "group_size must be positive, or -1", w, g, scales, [1.0], 0, *rest)
    check_refused(
        "awq_search", r"\[q_min, q_max\] must fit int8", w, g, scales, [1.0], 8, -8, 700, True, 7.5, torch.float32
    )
    check_refused("awq_search", "scale_dtype must be float32", w, g, scales, [1.0], 8, -8, 7, True, 7.5, torch.float64)


@pytest.mark.parametrize("symmetric", [True, False])
def test_compiles(symmetric: bool) -> None:
    w, g, scales = problem(270, 60)
    arguments = (w, g, scales, [1.0, 0.9], 32, -8, 7, symmetric, 7.5, torch.float32)
    torch.library.opcheck(torch.ops.quantkit.awq_search.default, arguments)

    def best(w: Tensor, g: Tensor, scales: Tensor) -> Tensor:
        return ops.awq_search(w, g, scales, group_size=32, q_min=-8, q_max=7, divisor=7.5).argmin()

    assert torch.compile(best, fullgraph=True)(w, g, scales) == best(w, g, scales)
