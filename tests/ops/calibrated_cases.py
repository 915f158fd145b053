"""What the CUDA ops of the calibrated algorithms are asked, on the host emulation and on a device alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import quantkit.ops as ops
from quantkit.ops.search import _mse_candidates, _mse_errors

Arguments = tuple[Any, ...]
OPS = {
    *("gptq_sweep", "gram_accumulate", "awq_search", "smoothquant_scales", "mse_scale", "histogram_accumulate"),
    *("percentile_scale", "histogram_scale"),
}


def inputs(rows: int, cols: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and the Gram matrix of correlated inputs with a few loud channels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * cols + 8, cols, generator=generator) @ (
        torch.eye(cols) + 0.3 * torch.randn(cols, cols, generator=generator) / cols**0.5
    )
    x[:, :: max(cols // 3, 2)] *= 8.0
    return torch.randn(rows, cols, generator=generator), x.T @ x


def sweep_cases(rows: int, cols: int, batch: int = 0, shared: bool = False) -> Iterator[Arguments]:
    """Groups that are fitted in the stripe, before it, for the row; given scales; searches; an offset, strided w."""
    found = [inputs(rows, cols, seed) for seed in range(max(batch, 1))]
    factors = [ops.gptq_factor(g)[0] for _, g in found]
    w = torch.stack([w for w, _ in found]) if batch else found[0][0]
    u = torch.stack(factors) if batch and not shared else factors[0]
    if rows > 2:
        w[..., 1, :] = 0.0
    wide = torch.cat([w, w], -1)[..., 1 : cols + 1] if cols > 1 else w

    for size in (16, 32, 128, 24, 100, 160, -1):
        yield w, u, None, None, size, -8, 7, True, 7.3, torch.float32, None, 0.0, 0, False
    yield wide, u, None, None, 32, -8, 7, False, 0.0, torch.bfloat16, None, 0.0, 0, False
    yield w, u, None, None, 48, -128, 127, False, 0.0, torch.float16, None, 0.0, 0, False
    for size in (64, 24, -1):
        yield w, u, None, None, size, -8, 7, True, 7.3, torch.float32, None, 0.4, 5, False
        yield w, u, None, None, size, -8, 7, False, 0.0, torch.float32, None, 0.7, 14, False
        yield w, u, None, None, size, -8, 7, True, 0.0, torch.bfloat16, None, 0.4, 3, True
    flat = w.reshape(-1, cols)
    shape = (*w.shape[:-1], -1)
    order = torch.randperm(cols, generator=torch.Generator().manual_seed(1))
    g_idx = (torch.arange(cols) // 32)[order].to(torch.int32)
    scale = ops.symmetric_scale(ops.absmax(flat, [1, 32]), 7.3).view(shape)
    yield w, u, scale, None, 32, -8, 7, True, 7.3, torch.float32, g_idx, 0.0, 0, False
    pair = ops.asymmetric_scale(*ops.minmax(flat, [1, 32]), -8, 7)
    scale, zero_point = (t.view(shape) for t in pair)
    yield w, u, scale, zero_point, 32, -8, 7, False, 0.0, torch.float32, None, 0.0, 0, False
    yield wide, u, scale, zero_point, 32, -8, 7, False, 0.0, torch.float32, g_idx, 0.0, 0, False
    for bits, most in ((8, 448.0), (4, 6.0)):
        scale = ops.symmetric_scale(0.9 * ops.absmax(flat, [1, 32]), most).view(shape)  # the largest saturate
        yield w, u, scale, None, 32, -1, 1, True, 0.0, torch.float32, None, 0.0, 0, False, bits
        yield wide, u, scale, None, 32, -1, 1, True, 0.0, torch.float32, g_idx, 0.0, 0, False, bits


def gram_cases(tokens: int, cols: int) -> Iterator[Arguments]:
    """Dtypes, masks, with and without channels, x that is a part of a wider matrix, or transposed."""
    generator = torch.Generator().manual_seed(tokens + cols)
    wide = torch.randn(tokens, cols + 9, generator=generator)
    g = torch.randn(cols, cols, generator=generator)
    g = g + g.T
    mask = torch.rand(tokens, generator=generator) < 0.6
    fresh = torch.tensor([[torch.inf], [-torch.inf], [0.0]]).repeat(1, cols)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = wide.to(dtype)
        yield x[:, :cols].contiguous(), None, g, None
        yield x[:, 8 : 8 + cols], mask, g, fresh
        hidden = x[:, 1 : 1 + cols].clone()
        hidden[~mask] = torch.nan  # tokens that do not count may hold anything
        yield hidden, mask, g, torch.stack([-torch.ones(cols), torch.ones(cols), torch.ones(cols)])
        yield x.T.contiguous().T[:, :cols], None, g, fresh


def assert_gram(got: tuple[Tensor, ...], args: Arguments) -> None:
    x, mask, g, channels = args
    wide = x.double() if mask is None else x[mask].double()
    exact = g.double() + wide.T @ wide
    # Each of n additions rounds by half a step of at most the sum of all magnitudes; sums on tensor cores may cut off.
    bound = (len(wide) + 2) * 2.0**-23 * (g.double().abs() + wide.abs().T @ wide.abs())
    assert torch.equal(got[0], got[0].T) and ((got[0].cpu().double() - exact).abs() <= bound).all()
    if channels is not None:
        low, high, total = got[1].cpu()
        empty = len(wide) == 0
        assert torch.equal(low, channels[0] if empty else torch.minimum(channels[0], wide.amin(0).float()))
        assert torch.equal(high, channels[1] if empty else torch.maximum(channels[1], wide.amax(0).float()))
        torch.testing.assert_close(total.double(), channels[2] + wide.abs().sum(0), rtol=len(wide) * 2.0**-23, atol=0)


def awq_cases(rows: int, cols: int) -> Iterator[Arguments]:
    """Dtypes of w, groups on and off chunks, candidates with clip ratios, one of them not usable."""
    w, g = inputs(rows, cols)
    generator = torch.Generator().manual_seed(7)
    scales = torch.exp(torch.randn(3, cols, generator=generator) / 2)
    scales[0] = 1.0
    broken = torch.cat([scales, scales])[:4]
    broken[1, cols // 2] = torch.nan
    broken[2, 0] = 0.0
    yield w, g, scales, [1.0, 0.8], 128, -8, 7, True, 7.5, torch.float32
    yield w.bfloat16(), g, scales, [1.0], -1, -128, 127, True, 127.5, torch.bfloat16
    yield w.half(), g, broken, [0.9], 24, -8, 7, False, 0.0, torch.float16
    yield (
        w.T.contiguous().T,
        torch.cat([g, g], 1)[:, :cols],
        scales[::2],
        [1.0, 0.7, 0.6],
        5,
        -8,
        7,
        False,
        0.0,
        w.dtype,
    )


def assert_losses(got: Tensor, args: Arguments) -> None:
    reference = ops._library.REFERENCES["awq_search"](args[0], args[1].contiguous().double().float(), *args[2:])
    assert torch.equal(got.cpu().isinf(), reference.isinf())
    torch.testing.assert_close(got.cpu(), reference, rtol=1e-4, atol=1e-12)


def smooth_cases() -> Iterator[Arguments]:
    generator = torch.Generator().manual_seed(3)
    for n in (0, 1, 300, 2000):
        a, w = (torch.exp(12 * torch.randn(n, generator=generator)) for _ in range(2))
        a[::7], w[::5] = 0.0, 0.0
        a[3::50], w[4::50] = 3e38, 1e-45
        for strength, minimum in ((0.5, 1e-5), (0.0, 1e-5), (1.0, 1.0), (0.83, 1e-30)):
            yield a, w, strength, minimum


def assert_smooth(got: Tensor, args: Arguments) -> None:
    """Two fp64 powers, each within a few of their last places, then one rounding: at most the next fp32 number."""
    wanted = ops._library.REFERENCES["smoothquant_scales"](*args)
    torch.testing.assert_close(got.cpu(), wanted, rtol=2.0**-23, atol=0)


def mse_cases(x: Tensor, block: list[int]) -> Iterator[Arguments]:
    importance = torch.rand(x.shape[1], generator=torch.Generator().manual_seed(1)) * 1e20
    yield x, block, None, -8, 7, True, 7.5, torch.bfloat16, 2.4, 0.2, 20, False
    yield x, block, importance, -127, 127, True, 127.0, torch.float32, 2.0, 0.6, 9, True
    yield x, block, importance, -8, 7, False, 0.0, torch.float16, 1.0, 0.8, 5, False
    yield x, block, None, -8, 7, False, 0.0, torch.float32, 2.0, 0.3, 3, False
    yield x, block, None, -8, 7, True, 7.5, torch.float32, 2.4, 0.2, 0, False
    yield x, block, None, -8, 7, True, 0.0, torch.bfloat16, 2.4, 0.3, 10, True
    yield x, block, None, -8, 7, True, 0.0, torch.float32, 2.0, 0.0, 0, True


def assert_least(got: tuple[Tensor, Tensor], args: Arguments) -> None:
    """The result is a candidate, and its exact error the least but for what fp32 powers and differences lose."""
    x, block, importance, q_min, q_max, symmetric, divisor, scale_dtype, norm, *grid = args
    scale, zero = got[0].cpu(), got[1].cpu()
    scales, zeros = _mse_candidates(x, block, q_min, q_max, symmetric, divisor, scale_dtype, *grid)
    errors = _mse_errors(x, block, importance, scales, zeros, q_min, q_max, norm)
    same = scales == scale
    if not symmetric:
        same &= zeros == zero
    assert same.any(0).all(), "a result that is no candidate"
    mine = torch.where(same, errors, torch.inf).amin(0)
    assert (mine <= errors.amin(0) * (1 + 2e-5) + 1e-30).all(), (mine / errors.amin(0)).max()


def histogram_cases() -> Iterator[Arguments]:
    """Values in order of magnitude, so that the span grows by one step and by many, from nothing and from much."""
    generator = torch.Generator().manual_seed(5)
    counts = torch.randint(0, 1 << 40, (8192,), generator=generator)
    for rows, cols in ((1, 1), (5, 7), (60, 130), (300, 33)):
        x = torch.randn(rows, cols, generator=generator) * torch.exp(3 * torch.randn(rows, 1, generator=generator))
        x[:, ::5] = 0.0
        x[0, 0] = -0.0
        mask = torch.rand(rows, generator=generator) < 0.7
        for dtype, span in (
            (torch.float32, 0.0),
            (torch.float32, 0.25),
            (torch.bfloat16, 2.0**-100),
            (torch.float16, 0.5),
        ):
            held = counts if span else torch.zeros(8192, dtype=torch.int64)
            hidden = torch.where(mask[:, None], x, torch.nan).to(dtype)
            yield hidden, mask, held, torch.tensor([span])
            yield x.to(dtype).T, None, held, torch.tensor([span])
    for unit in (0.0, 1e-45, 1e-35, 2.0**126, 1.0, 2.0**-20):
        yield torch.full((3, 9), -unit), None, counts, torch.tensor([2.0**-10])
        yield torch.full((3, 9), unit), None, torch.zeros(8192, dtype=torch.int64), torch.zeros(1)


def percentile_cases(x: Tensor, block: list[int]) -> Iterator[Arguments]:
    for i, percentile in enumerate((99.9, 50.0, 1e-9, 100.0, 87.5)):
        yield x, block, percentile, -8, 7, True, 7.5, (torch.bfloat16, torch.float32)[i % 2]
        yield x, block, percentile, -128, 127, False, 0.0, (torch.float32, torch.float16)[i % 2]


def histogram_scale_cases() -> Iterator[Arguments]:
    """Every method over distributions with and without tails, gaps, a side or anything at all."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(60, 100, generator=generator)
    few = torch.randint(-7, 8, (50, 50), generator=generator).float()  # bins far apart, many ranges without loss
    for i, values in enumerate((x, x**5 * 2.0**-90, x.exp() * 1e5, -x.abs() - 1, few, torch.zeros(2, 2))):
        counts, span = torch.zeros(8192, dtype=torch.int64), torch.zeros(1)
        ops._library.REFERENCES["histogram_accumulate"](values, None, counts, span)
        found = counts, span, torch.stack((values.min(), values.max()))
        for q_min, q_max, symmetric, divisor in ((-8, 7, True, 7.5), (-128, 127, False, 0.0), (0, 15, False, 0.0)):
            for method, parameter in ((0, (99.9, 50.0)[i % 2]), (1, (2.0, 2.4)[i % 2]), (2, 0.0), (3, 0.0), (4, 0.0)):
                yield *found, method, parameter, q_min, q_max, symmetric, divisor
