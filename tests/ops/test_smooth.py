"""smoothquant_scales."""

from __future__ import annotations

import torch

import quantkit.ops as ops

from .cpu_cases import call, check_compiles, check_refused, reference


def test_like_the_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    a, w = (torch.exp2(torch.rand(1003, generator=generator) * 250 - 126) for _ in range(2))
    a[::7], w[::5] = 0.0, 0.0
    a[1], w[1], a[2], w[2] = 3e38, 1e-45, 1e-45, 3e38
    for strength in (0.0, 0.3, 0.5, 1.0):
        found = call("smoothquant_scales", a, w, strength, 1e-5)
        torch.testing.assert_close(found, reference("smoothquant_scales", a, w, strength, 1e-5), rtol=2e-7, atol=0)
        assert found.isfinite().all() and (found >= 1e-5).all()
        assert found[(a == 0) | (w == 0)].eq(1).all()


def test_half_strength_balances() -> None:
    a, w = torch.rand(100) + 0.1, torch.rand(100) + 0.1
    s = ops.smoothquant_scales(a, w)
    torch.testing.assert_close(a / s, w * s)
    assert ops.smoothquant_scales(a[:0], w[:0]).shape == (0,)


def test_refuses() -> None:
    x, op = torch.ones(3), "smoothquant_scales"
    for bad in (float("nan"), float("inf"), -1.0):
        y = torch.tensor([1.0, bad, 1.0])
        check_refused(op, "smoothquant_scales: activation must be finite and not negative", y, x, 0.5, 1e-5)
        check_refused(op, "smoothquant_scales: weight must be finite and not negative", x, y, 0.5, 1e-5)
    check_refused(op, r"weight \[2\] must have activation's shape \[3\]", x, x[:2], 0.5, 1e-5)
    check_refused(op, r"activation must be float32 \[channels\], got torch.float16 \[3\]", x.half(), x, 0.5, 1e-5)
    check_refused(op, r"strength must be in \[0, 1\], got 1.5", x, x, 1.5, 1e-5)
    check_refused(op, "minimum must be above 0 and at most 1, got 0", x, x, 0.5, 0.0)


def test_compiles() -> None:
    check_compiles("smoothquant_scales", torch.ones(5), torch.full((5,), 4.0), 0.5, 1e-5)
