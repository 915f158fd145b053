"""What the CUDA ops of the calibrated algorithms are asked, on the host emulation and on a device alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import quantkit.ops as ops

Arguments = tuple[Any, ...]


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
        yield w, u, None, None, size, -8, 7, True, 7.3, torch.float32, None, 0.0, 0
    yield wide, u, None, None, 32, -8, 7, False, 0.0, torch.bfloat16, None, 0.0, 0
    yield w, u, None, None, 48, -128, 127, False, 0.0, torch.float16, None, 0.0, 0
    for size in (64, 24, -1):
        yield w, u, None, None, size, -8, 7, True, 7.3, torch.float32, None, 0.4, 5
        yield w, u, None, None, size, -8, 7, False, 0.0, torch.float32, None, 0.7, 14
    flat = w.reshape(-1, cols)
    shape = (*w.shape[:-1], -1)
    order = torch.randperm(cols, generator=torch.Generator().manual_seed(1))
    g_idx = (torch.arange(cols) // 32)[order].to(torch.int32)
    scale = ops.symmetric_scale(ops.absmax(flat, [1, 32]), 7.3).view(shape)
    yield w, u, scale, None, 32, -8, 7, True, 7.3, torch.float32, g_idx, 0.0, 0
    pair = ops.asymmetric_scale(*ops.minmax(flat, [1, 32]), -8, 7)
    scale, zero_point = (t.view(shape) for t in pair)
    yield w, u, scale, zero_point, 32, -8, 7, False, 0.0, torch.float32, None, 0.0, 0
    yield wide, u, scale, zero_point, 32, -8, 7, False, 0.0, torch.float32, g_idx, 0.0, 0
