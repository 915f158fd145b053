"""gram_accumulate against fp64."""

from __future__ import annotations

import pytest
import torch

import quantkit.ops as ops

from .cpu_cases import FLOATS, check_refused

SHAPES = ((1, 1), (3, 5), (2, 16), (255, 17), (256, 48), (257, 100), (600, 130), (1030, 49))


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
    ops._library.REFERENCES["gram_accumulate"](x, None, reference, None)
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


def start(cols: int) -> torch.Tensor:
    return torch.tensor([float("inf"), -float("inf"), 0.0])[:, None].repeat(1, cols)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("tokens", "cols"), SHAPES)
def test_mask_and_channels(tokens: int, cols: int, dtype: torch.dtype) -> None:
    x = torch.randn(tokens, cols + 3).to(dtype)[:, 1 : cols + 1]
    mask = torch.rand(tokens, 2)[:, 0] < 0.6
    mask[-1] = True
    g, kept, channels = torch.zeros(cols, cols), torch.zeros(cols, cols), start(cols)
    ops.gram_accumulate(x, g, mask=mask, channels=channels)
    ops.gram_accumulate(x[mask], kept)
    assert torch.equal(g, kept)
    low, high, total = x[mask].amin(0), x[mask].amax(0), x[mask].double().abs().sum(0)
    assert torch.equal(channels[0], low.float())
    assert torch.equal(channels[1], high.float())
    torch.testing.assert_close(channels[2].double(), total, rtol=2e-5, atol=0)
    # More data changes what is there; the reference agrees.
    other = channels.clone()
    ops.gram_accumulate(2 * x, g, channels=channels)
    ops._library.REFERENCES["gram_accumulate"](2 * x, None, kept, other)
    assert torch.equal(channels[:2], other[:2])
    torch.testing.assert_close(channels[2], other[2], rtol=2e-5, atol=0)
    assert torch.equal(g, g.T)


def test_mask_hides_nan() -> None:
    x = torch.randn(6, 20)
    x[2, 3], x[4, 7] = float("nan"), float("inf")
    g, channels = torch.zeros(20, 20), start(20)
    ops.gram_accumulate(x, g, channels=channels)
    assert channels[:, 3].isnan().all()
    assert channels.isnan().sum() == 3
    assert channels[1:, 7].isinf().all()
    mask = torch.tensor([True, True, False, True, False, True])
    g, channels = torch.zeros(20, 20), start(20)
    ops.gram_accumulate(x, g, mask=mask, channels=channels)
    assert g.isfinite().all()
    assert channels.isfinite().all()


def test_no_tokens() -> None:
    g, channels = torch.ones(4, 4), start(4)
    ops.gram_accumulate(torch.zeros(0, 4), g, channels=channels)
    ops.gram_accumulate(torch.ones(2, 4), g, mask=torch.zeros(2, dtype=torch.bool), channels=channels)
    assert g.eq(1).all()
    assert torch.equal(channels, start(4))


def test_refuses() -> None:
    x, g = torch.ones(2, 4), torch.zeros(4, 4)
    check_refused("gram_accumulate", r"g must be torch.float32 \[4, 4\]", x, None, g[:3], None)
    check_refused("gram_accumulate", "x must be float32, float16 or bfloat16", x.int(), None, g, None)
    check_refused("gram_accumulate", "x must be 2-D", x[0], None, g, None)
    check_refused("gram_accumulate", r"mask must be torch.bool \[2\]", x, torch.ones(3, dtype=torch.bool), g, None)
    check_refused("gram_accumulate", r"channels must be torch.float32 \[3, 4\]", x, None, g, torch.ones(3, 5))
    check_refused("gram_accumulate", "channels must be contiguous", x, None, g, torch.ones(4, 3).T)
    check_refused("gram_accumulate", "g must be contiguous", x, None, torch.zeros(4, 8)[:, :4], None)


def test_compiles() -> None:
    torch.library.opcheck(torch.ops.quantkit.gram_accumulate.default, (torch.ones(2, 4), None, torch.zeros(4, 4), None))
    mask = torch.tensor([True, False])
    torch.library.opcheck(
        torch.ops.quantkit.gram_accumulate.default, (torch.ones(2, 4), mask, torch.zeros(4, 4), start(4))
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("tokens", "cols"), [*SHAPES, (2050, 47), (5, 65)])
def test_the_upper_half_first_and_the_lower_one_at_the_end(tokens: int, cols: int, dtype: torch.dtype) -> None:
    x = torch.randn(tokens, cols + 3).to(dtype)[:, 1 : cols + 1]
    parts = (x, x[: tokens // 2 + 1])
    whole, own = torch.zeros(cols, cols), start(cols)
    for part in parts:
        ops.gram_accumulate(part, whole, channels=own)
    g, channels = torch.full((cols, cols), float("nan")), start(cols)
    for part in parts:
        ops.gram_upper(part, g, channels=channels, fresh=part is x)
    assert torch.equal(g.triu(), whole.triu()), "the bits of sums onto zeros"
    assert torch.equal(channels, own)
    ops.mirror_upper(g)
    assert torch.equal(g, whole)


def test_a_fresh_matrix_has_no_negative_zeros() -> None:
    for dtype in FLOATS:
        x = torch.tensor([[0.0, -1.0, 1e-30, -1e-30]], dtype=dtype)
        g, zeros = torch.full((4, 4), -0.0), torch.zeros(4, 4)
        ops.gram_upper(x, g, fresh=True)
        ops.mirror_upper(g)
        ops.gram_accumulate(x, zeros)
        assert torch.equal(g.view(torch.int32), zeros.view(torch.int32))


def test_mirror_of_any_size() -> None:
    for cols in (0, 1, 2, 15, 16, 17, 63, 64, 65, 130, 200):
        g = torch.randn(cols, cols)
        wanted = g.triu() + g.triu(1).T
        ops.mirror_upper(g)
        assert torch.equal(g, wanted)


def test_upper_like_its_reference() -> None:
    x, g = torch.randn(300, 70), torch.randn(70, 70)
    for fresh in (False, True):
        got, wanted, mine, theirs = g.clone(), g.clone(), start(70), start(70)
        ops.gram_upper(x, got, channels=mine, fresh=fresh)
        ops._library.REFERENCES["gram_upper"](x, wanted, theirs, fresh)
        torch.testing.assert_close(got.triu(), wanted.triu(), rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=0)
        ops.mirror_upper(got)
        ops._library.REFERENCES["mirror_upper"](wanted)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-3)
    kept = g.clone()
    ops.gram_upper(x[:0], kept)
    assert torch.equal(kept, g)


def test_upper_refuses() -> None:
    x, g = torch.ones(2, 4), torch.zeros(4, 4)
    check_refused("gram_upper", r"g must be torch.float32 \[4, 4\]", x, g[:3], None, False)
    check_refused("gram_upper", r"channels must be torch.float32 \[3, 4\]", x, g, torch.ones(3, 5), False)
    check_refused("gram_upper", "x must have a token to make a fresh g of", x[:0], g, None, True)
    check_refused("mirror_upper", r"g must be a square of torch.float32, got torch.float32 \[3, 4\]", g[:3])
    check_refused("mirror_upper", "g must be a square of torch.float32, got torch.float16", g.half())
    check_refused("mirror_upper", "g must be contiguous", torch.zeros(4, 8)[:, :4])
    torch.library.opcheck(torch.ops.quantkit.gram_upper.default, (x, torch.zeros(4, 4), start(4), True))
    torch.library.opcheck(torch.ops.quantkit.mirror_upper.default, (torch.ones(4, 4),))
