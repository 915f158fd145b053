"""int8_mixed_gemm: the int8 part bit for bit, the sums over outliers within their rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import quantkit.ops as ops

from .cpu_cases import FLOATS, check, check_compiles, check_refused, reference

SHAPES = ((1, 1, 1), (3, 63, 31), (7, 65, 66), (6, 130, 130), (50, 70, 257), (2, 64, 4100))


def arguments(m: int, n: int, k: int, dtype: torch.dtype, outliers: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(m + 10 * n + k)
    x = torch.randn(m, k, generator=generator).clamp(-5, 5)
    x[torch.randint(m, (outliers,), generator=generator), torch.randint(k, (outliers,), generator=generator)] = -6.0
    x *= 1 + 20 * (x.abs() >= 6)
    w = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
    return x.to(dtype), w, ops.pack_w8a8(w), torch.rand(n, generator=generator) / 50 + 0.01


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_like_the_reference(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    for outliers in (1, 7):
        x, w, packed, scale = arguments(m, n, k, dtype, outliers)
        bias = torch.randn(n)
        out = (x.float().abs() >= 6).any(0)
        assert out.any()
        got = ops.int8_mixed_gemm(x, packed, scale, n, bias=bias)
        wanted = reference("int8_mixed_gemm", x.float(), packed, scale, n, 6.0, bias)
        # fp32 sums of `count` products in one order, then two additions, then the result's rounding.
        sizes = x[:, out].double().abs() @ w[:, out].double().abs().T * scale
        unit = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
        bound = (int(out.sum()) + 3) * 2.0**-23 * (sizes + wanted.abs() + bias.abs()) + unit * wanted.abs()
        assert ((got.double() - wanted.double()).abs() <= bound * 1.01 + 1e-30).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_without_outliers_it_is_w8a8(dtype: torch.dtype) -> None:
    x, _, packed, scale = arguments(9, 70, 100, dtype, 0)
    assert torch.equal(ops.int8_mixed_gemm(x, packed, scale, 70), ops.w8a8_gemm(x, packed, scale, 70))
    check("int8_mixed_gemm", x, packed, scale, 70, 6.0, torch.ones(70))


def test_outliers_cost_the_others_nothing() -> None:
    """The int8 part is that of x without the columns; one outlier alone has an exact product in fp32."""
    x, w, packed, scale = arguments(4, 80, 96, torch.bfloat16, 0)
    x[1, 40] = 100.0
    rest = x.clone()
    rest[:, 40] = 0
    q, s, _ = ops.int8_quant_per_token(rest)
    y = (q.long() @ w.long().T).float() * (s * scale) + (x[:, 40:41].float() * w[:, 40].float()) * scale
    assert torch.equal(ops.int8_mixed_gemm(x, packed, scale, 80), y.bfloat16())
    exact = x.double() @ (w.double() * scale.double()[:, None]).T
    mixed = (ops.int8_mixed_gemm(x, packed, scale, 80).double() - exact)[1].norm()
    plain = (ops.w8a8_gemm(x, packed, scale, 80).double() - exact)[1].norm()
    assert mixed < 0.25 * plain


def test_every_column_may_be_an_outlier() -> None:
    x, w, packed, scale = arguments(5, 66, 37, torch.float16, 0)
    got = ops.int8_mixed_gemm(x, packed, scale, 66, threshold=1e-9)
    out = (x.abs() >= 1e-9).any(0)
    assert out.sum() == 37
    exact = x.double() @ (w.double() * scale.double()[:, None]).T
    size = x.double().abs() @ (w.double() * scale.double()[:, None]).abs().T
    assert ((got.double() - exact).abs() <= 40 * 2.0**-24 * size + 2.0**-11 * exact.abs()).all()


def test_nan_and_infinity() -> None:
    x, _, packed, scale = arguments(6, 20, 40, torch.bfloat16, 0)
    before = ops.int8_mixed_gemm(x, packed, scale, 20)
    x[1, 3] = float("nan")
    after = ops.int8_mixed_gemm(x, packed, scale, 20)
    assert after[1].isnan().all()
    assert torch.equal(after[[0, 2, 3, 4, 5]], before[[0, 2, 3, 4, 5]])
    x[4, 3] = 9.0  # an outlier in a column that a NaN hides
    check("int8_mixed_gemm", x, packed, scale, 20, 6.0, None)
    x[5, 7] = float("inf")
    result = ops.int8_mixed_gemm(x, packed, scale, 20)
    assert (~result[5].isfinite()).all()
    assert result[[0, 2, 3, 4]].isfinite().all()


def test_threads_and_strides() -> None:
    threads, results = torch.get_num_threads(), []
    x, _, packed, scale = arguments(40, 200, 700, torch.bfloat16, 5)
    wide = torch.zeros(40, 709, dtype=x.dtype)
    wide[:, 3:703] = x
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(ops.int8_mixed_gemm(x, packed, scale, 200))
            results.append(ops.int8_mixed_gemm(wide[:, 3:703], packed, scale, 200))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_empty_and_refused() -> None:
    for m, n, k in ((0, 5, 7), (4, 0, 7), (4, 5, 0)):
        packed = ops.pack_w8a8(torch.ones(n, k, dtype=torch.int8))
        check("int8_mixed_gemm", torch.ones(m, k), packed, torch.ones(1), n, 6.0, None)
    x, _, packed, scale = arguments(2, 3, 8, torch.float32, 0)
    check_refused("int8_mixed_gemm", "threshold must be positive", x, packed, scale, 3, 0.0, None)
    check_refused("int8_mixed_gemm", "packed must be what pack_w8a8 makes", x, packed, scale, 65, 6.0, None)
    check_refused("int8_mixed_gemm", "weight_scale must be", x, packed, scale[:2], 3, 6.0, None)
    check_refused("int8_mixed_gemm", "x must be 2-D", x[0], packed, scale, 3, 6.0, None)
    check_refused("int8_mixed_gemm", "bias must be", x, packed, scale, 3, 6.0, scale[:2])


def test_compiles() -> None:
    x, _, packed, scale = arguments(3, 20, 33, torch.bfloat16, 0)
    check_compiles("int8_mixed_gemm", x, packed, scale, 20, 6.0, torch.ones(20))
