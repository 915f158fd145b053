"""The CUDA sources of sage_attention and attention, run on the CPU, against fp64 and the reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from . import emulated_cuda
from .cpu_cases import FLOATS, reference
from .test_attention import exact, inputs, mask, relative

pytestmark = pytest.mark.skipif(emulated_cuda.compiler() is None, reason="no C++ compiler: set CXX")


@pytest.mark.parametrize(
    ("tokens", "keys", "causal", "size"),
    [
        (1, 1, True, 16),
        (7, 50, True, 48),
        (70, 131, True, 64),
        (65, 100, False, 80),
        (20, 70, True, 128),
        (17, 70, True, 160),
        (9, 40, False, 256),
        (5, 70, True, 512),
    ],
)
def test_rounding_of_weights_alone(emulated: Any, tokens: int, keys: int, causal: bool, size: int) -> None:
    """Integers that are their own codes; see the test of the CPU's kernels for the bounds."""
    torch.manual_seed(0)
    q = torch.randint(-127, 128, (1, 2, tokens, size)).float()
    k = torch.randint(-127, 128, (1, 1, keys, size)).float()
    q[..., 3] = k[..., 5] = 127.0
    v, scale = torch.randn(1, 1, keys, size), 4.0 / (127 * 127 * math.sqrt(size))
    seen = mask(tokens, keys, causal, None, None, 0)
    expected, magnitude, total = exact(q, k, v.bfloat16(), seen, scale)
    for per_token in (True, False):
        result = emulated("sage_attention", (q, k, v, causal, scale, None, None, 0, False, per_token, 0))
        assert ((result - expected).abs() <= (2**-8 + 1e-5) * magnitude).all()
        result = emulated("sage_attention", (q, k, v, causal, scale, None, None, 0, False, per_token, 1))
        expected8, _, _ = exact(q, k, v, seen, scale)
        counts = seen.sum(-1)[:, None, :, None]
        off = 0.5001 / 127
        denominator = (total - off * counts).clamp(min=1.0)
        numbers = seen[:, None].double() @ v.double().abs() + counts * expected8.abs()
        steps = v.abs().amax(2, keepdim=True) / 127
        assert ((result - expected8).abs() <= off * numbers / denominator + 0.501 * steps + 1e-5).all()
    result = emulated("attention", (q, k, v, causal, scale, None, None, 0))
    assert ((result - expected).abs() <= (2**-8 + 1e-4) * magnitude).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_like_reference(emulated: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    ways = [
        ((2, 4, 2, 7, 7, 64), True, True, True, 0, 0, False),
        ((2, 2, 1, 33, 70, 80), False, False, True, 1, 0, True),
        ((1, 2, 2, 5, 140, 96), True, False, False, 0, 40, False),
        ((2, 2, 2, 66, 66, 32), True, True, True, 1, 20, True),
    ]
    for shape, causal, per_token, smooth, pv, window, bounded in ways:
        q, k, v = inputs(*shape, dtype)
        lengths = torch.randint(shape[4] // 2 + 1, shape[4] + 1, (shape[0],)) if bounded else None
        starts = None if lengths is None else lengths // 3
        both = (q, k, v, causal, shape[5] ** -0.5, starts, lengths, window)
        result = emulated("sage_attention", (*both, smooth, per_token, pv))
        expected = reference("sage_attention", *both, smooth, per_token, pv)
        assert result.dtype == dtype and result.stride() == expected.stride()
        # One step of a code of K, where means differ in their last bit, is allowed for.
        assert relative(result, expected.double()) < (4e-3 if pv else 2e-3), shape
        assert (result.float() - expected.float()).abs().max() < (0.03 if pv else 8e-3), shape
        result, expected = emulated("attention", both), reference("attention", *both)
        torch.testing.assert_close(result, expected, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_what_is_not_finite(emulated: Any, value: float) -> None:
    torch.manual_seed(2)
    clean = inputs(1, 4, 2, 40, 100, 64)
    for op, rest in (("sage_attention", (True, True, 0)), ("sage_attention", (True, False, 1)), ("attention", ())):
        for which in (0, 1, 2):
            changed = [x.clone() for x in clean]
            changed[which][0, 1, 20 if which == 0 else 80, 7] = value
            result = emulated(op, (*changed, True, 0.125, None, None, 0, *rest))
            lost = torch.zeros(4, 40, dtype=torch.bool)
            if which == 0:
                lost[1, 20] = True
            else:
                lost[2:, 20:] = True
            assert result.isnan().all(-1)[0].equal(lost) and result.isnan().any(-1)[0].equal(lost)
        lengths, starts = torch.tensor([90]), torch.tensor([5])
        hidden = [x.clone() for x in clean]
        for x in hidden[1:]:
            x[:, :, :5] = value
            x[:, :, 90:] = value
        result = emulated(op, (*hidden, True, 0.125, starts, lengths, 0, *rest))
        assert result.isfinite().all()


def test_empty_and_refused(emulated: Any) -> None:
    for shape in ((0, 2, 1, 3, 5, 16), (2, 2, 1, 0, 5, 16), (2, 0, 1, 3, 5, 16)):
        q, k, v = inputs(*shape)
        assert emulated("attention", (q, k, v, True, 0.1, None, None, 0)).shape == q.shape
    q, k, v = inputs(1, 2, 1, 3, 0, 16)
    assert emulated("attention", (q, k, v, False, 0.1, None, None, 0)).eq(0).all()
    q, k, v = inputs(2, 4, 2, 3, 5, 32)
    for words, args in (
        ("k must be 4-D", (q, k[0], v, True, 0.1, None, None, 0)),
        ("q must have no more tokens than k, got 3 and 2", (q, k[:, :, :2], v[:, :, :2], True, 0.1, None, None, 0)),
        ("head size must be a multiple of 16", (q[..., :24], k[..., :24], v[..., :24], True, 0.1, None, None, 0)),
        ("scale must be positive and finite, got 0", (q, k, v, True, 0.0, None, None, 0)),
        (r"lengths must be torch.int64 \[2\]", (q, k, v, True, 0.1, None, torch.tensor([1]), 0)),
    ):
        with pytest.raises(RuntimeError, match=f"quantkit::attention: .*{words}"):
            emulated("attention", args)
