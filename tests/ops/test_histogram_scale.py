"""histogram_scale: the kernel finds what the reference finds, and the methods do what they say."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import quantkit.ops as ops
from quantkit.ops.histogram_scale import _DEFAULTS, METHODS

from .cpu_cases import call, check_compiles, check_refused, reference
from .test_histogram import histogram

# q_min, q_max, symmetric, divisor
CODES = ((-8, 7, True, 7.5), (-127, 127, True, 127.0), (-128, 127, False, 0.0), (0, 15, False, 0.0))


def distributions() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 300, generator=generator)
    yield x
    yield x * 2.0**-90
    yield x.exp()
    yield x**5
    yield torch.nn.functional.silu(3 * x) * 1e5
    yield x.relu()
    yield -x.abs() - 1
    yield torch.where(x > 4, 300 * x, x)
    yield torch.randint(-7, 8, (50, 50), generator=generator).float()  # bins far apart, many ranges without loss
    yield torch.tensor([[3.0]])
    yield torch.tensor([[-1e-30, 2e-30, 5e30]])
    yield torch.zeros(3, 4)


def extremes(x: Tensor) -> Tensor:
    return torch.stack((x.min(), x.max()))


@pytest.mark.parametrize("method", METHODS)
def test_is_the_reference(method: str) -> None:
    """Bit for bit: both weigh the same fp64 losses, equal but for roundings, and both count those as ties."""
    parameters = {"percentile": (99.99, 99.0, 50.0, 100.0), "mse": (2.0, 2.4, 1.0)}.get(method, (0.0,))
    for x in distributions():
        found = histogram(x)
        for codes in CODES:
            for parameter in parameters:
                args = (*found, extremes(x), METHODS.index(method), parameter, *codes)
                got, wanted = call("histogram_scale", *args), reference("histogram_scale", *args)
                assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1]), (x, codes, got, wanted)


def test_refuses() -> None:
    x = torch.randn(30, 40)
    counts, span = histogram(x)
    for message, args in (
        (r"range must be torch.float32 \[2\]", (counts, span, x[0], 0, 99.0, *CODES[0])),
        (r"counts must be torch.int64 \[8192\]", (counts[1:], span, extremes(x), 0, 99.0, *CODES[0])),
        ("counts must not be negative", (counts - 1, span, extremes(x), 0, 99.0, *CODES[0])),
        ("range must be finite", (counts, span, extremes(x) / 0.0, 0, 99.0, *CODES[0])),
        ("method must be 0 to 4, got 5", (counts, span, extremes(x), 5, 99.0, *CODES[0])),
        (r"percentile must be in \(0, 100\], got 0", (counts, span, extremes(x), 0, 0.0, *CODES[0])),
        ("the norm of mse must be above 0 and at most 8, got 9", (counts, span, extremes(x), 1, 9.0, *CODES[0])),
        ("a symmetric scale needs q_min < 0 < q_max", (counts, span, extremes(x), 1, 2.0, 0, 15, True, 15.0)),
        ("must fit int8", (counts, span, extremes(x), 1, 2.0, 0, 255, False, 0.0)),
    ):
        check_refused("histogram_scale", message, *args)


def test_compiles() -> None:
    x = torch.randn(30, 40)
    for i, method in enumerate(METHODS):
        check_compiles("histogram_scale", *histogram(x), extremes(x), i, _DEFAULTS[method], *CODES[i % 4])


def scale(x: Tensor, method: str, **how: object) -> tuple[Tensor, Tensor]:
    how = {"q_min": -8, "q_max": 7, "divisor": 7.5, **how}
    return ops.histogram_scale(*histogram(x), extremes(x), method=method, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["percentile", "mse", "kl", "eq", "admm"])
def test_every_method(method: str) -> None:
    x = torch.randn(300, 200, generator=torch.Generator().manual_seed(1))
    found, none = scale(x, method)
    assert none.numel() == 0 and 0 < found.item() <= x.abs().max() / 7.5
    # A power of two of the data is the same power of two of the scale.
    assert scale(x * 2.0**-40, method)[0].item() == found.item() * 2.0**-40
    lifted, zero = scale(x.abs(), method, symmetric=False, q_min=0, q_max=15)
    assert 0 < lifted.item() <= x.abs().max() / 15 * 1.001 and zero.dtype == torch.int8 and zero.item() == 0
    assert scale(torch.zeros(3, 4), method)[0].item() == 2.0**-100
    with pytest.raises(RuntimeError, match="quantkit::histogram_scale: range must be finite"):
        ops.histogram_scale(
            *histogram(x), torch.tensor([0.0, float("nan")]), method=method, q_min=-8, q_max=7, divisor=7.5
        )


def test_a_wrong_method_is_named() -> None:
    with pytest.raises(ValueError, match="unknown method 'percentil', did you mean 'percentile'"):
        scale(torch.ones(2, 2), "percentil")
