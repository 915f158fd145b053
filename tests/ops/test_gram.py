"""gram_accumulate against fp64."""

from __future__ import annotations

import pytest
import torch

import quantkit.ops as ops

from .cpu_cases import FLOATS, check_refused

SHAPES = ((1, 1), (3, 5), (2, 16), (255, 17), (256, 48), (257, 100), (600, 130))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("tokens", "cols"), SHAPES)
def test_like_fp64(tokens: int, cols: int, dtype: torch.dtype) -> None:
    x = torch.randn(tokens, cols + 3).to(dtype)[:, 1 : cols + 1]
    g = torch.zeros(cols, cols)
    exact = torch.zeros(cols, cols, dtype=torch.float64)
    for part in (x, x[: tokens // 2 + 1]):
        ops.gram_accumulate(part, g)
        exact += part.double().T @ part.double()
    assert torch.equal(g, g.T)
    sizes = exact.diagonal().sqrt()
    assert ((g - exact).abs() <= 2e-6 * sizes[:, None] * sizes).all()
    reference = torch.zeros(cols, cols)
    ops._library.REFERENCES["gram_accumulate"](x, reference)
    assert ((reference - x.double().T @ x.double()).abs() <= 2e-6 * sizes[:, None] * sizes).all()


def test_threads_leave_no_trace() -> None:
    x = torch.randn(300, 200).bfloat16()
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(torch.zeros(200, 200))
            ops.gram_accumulate(x, results[-1])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_and_infinity_show_on_the_diagonal(dtype: torch.dtype) -> None:
    x = torch.randn(20, 70)
    x[3, 5], x[19, 66] = float("nan"), float("inf")
    g = torch.zeros(70, 70)
    ops.gram_accumulate(x.to(dtype), g)
    assert (~g.diagonal().isfinite()).nonzero().flatten().tolist() == [5, 66]
    with pytest.raises(RuntimeError, match="2 of 70 diagonal elements"):
        ops.gptq_factor(g)


def test_no_tokens() -> None:
    g = torch.ones(4, 4)
    ops.gram_accumulate(torch.zeros(0, 4), g)
    assert g.eq(1).all()


def test_refuses() -> None:
    x, g = torch.ones(2, 4), torch.zeros(4, 4)
    check_refused("gram_accumulate", r"g must be torch.float32 \[4, 4\]", x, g[:3])
    check_refused("gram_accumulate", "x must be float32, float16 or bfloat16", x.int(), g)
    check_refused("gram_accumulate", "x must be 2-D", x[0], g)
    check_refused("gram_accumulate", "g must be contiguous", x, torch.zeros(4, 8)[:, :4])


def test_compiles() -> None:
    torch.library.opcheck(torch.ops.quantkit.gram_accumulate.default, (torch.ones(2, 4), torch.zeros(4, 4)))
