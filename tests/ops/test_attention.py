"""sage_attention and attention against fp64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import quantkit.ops as ops

from .cpu_cases import FLOATS, call, check_compiles, check_refused, reference


def inputs(
    batch: int, heads: int, kv_heads: int, tokens: int, keys: int, size: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(batch, heads, tokens, size)
    k = torch.randn(batch, kv_heads, keys, size) + 3 * torch.randn(size)
    v = torch.randn(batch, kv_heads, keys, size)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def mask(tokens: int, keys: int, causal: bool, starts: Tensor | None, lengths: Tensor | None, window: int) -> Tensor:
    """bool [batch or 1, tokens, keys]."""
    batch = 1 if lengths is None else len(lengths)
    key, place = torch.arange(keys), torch.arange(tokens)[:, None] + keys - tokens
    seen = torch.ones(batch, tokens, keys, dtype=torch.bool)
    for b in range(batch):
        for hidden in (
            key > place if causal else None,
            key <= place - window if window else None,
            key < starts[b] if starts is not None else None,
            key >= lengths[b] if lengths is not None else None,
        ):
            if hidden is not None:
                seen[b] &= ~hidden
    return seen


def exact(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """In fp64: the result, that for |v|, and the sum of weights relative to the largest."""
    group = q.shape[1] // k.shape[1]
    wide = [x.double().repeat_interleave(n, 1) for x, n in ((q, 1), (k, group), (v, group))]
    logits = (wide[0] @ wide[1].transpose(2, 3) * scale).masked_fill(~seen[:, None], -math.inf)
    top = logits.amax(-1, keepdim=True)
    weights = torch.exp(logits - top.masked_fill(top == -math.inf, 0.0))
    total = weights.sum(-1, keepdim=True)
    shares = weights / total.clamp(min=1e-300)
    return shares @ wide[2], shares @ wide[2].abs(), total


def relative(result: Tensor, expected: Tensor) -> float:
    """L1 error."""
    return float((result.double() - expected).abs().sum() / expected.abs().sum().clamp(min=1e-30))


@pytest.mark.parametrize("size", (16, 48, 64, 80, 96, 112, 128, 160, 256, 512))
@pytest.mark.parametrize(
    ("tokens", "keys", "causal"), ((1, 1, True), (7, 50, True), (200, 531, True), (65, 300, False))
)
def test_rounding_of_weights_alone(tokens: int, keys: int, causal: bool, size: int) -> None:
    """Integers that are their own codes: all that is left is the rounding of weights and values."""
    q = torch.randint(-127, 128, (1, 2, tokens, size)).float()
    k = torch.randint(-127, 128, (1, 1, keys, size)).float()
    q[..., 3] = k[..., 5] = 127.0
    v, scale = torch.randn(1, 1, keys, size), 4.0 / (127 * 127 * math.sqrt(size))
    seen = mask(tokens, keys, causal, None, None, 0)
    expected, magnitude, total = exact(q, k, v.bfloat16(), seen, scale)
    for per_token in (True, False):
        result = ops.sage_attention(q, k, v, causal=causal, scale=scale, smooth_k=False, per_token=per_token)
        # bf16 rounds weights by 2^-9 of them, above and below the line. The rest is fp32: logits below 32, sums.
        assert ((result - expected).abs() <= (2**-8 + 1e-5) * magnitude).all()
        result = ops.sage_attention(q, k, v, causal=causal, scale=scale, smooth_k=False, per_token=per_token, pv=1)
        # A weight is off by half a code of 1 / 127, a value by half a step of its channel.
        expected8, _, _ = exact(q, k, v, seen, scale)
        counts = seen.sum(-1)[:, None, :, None]
        off = 0.5001 / 127
        denominator = (total - off * counts).clamp(min=1.0)
        numbers = seen[:, None].double() @ v.double().abs() + counts * expected8.abs()
        steps = v.abs().amax(2, keepdim=True) / 127
        assert ((result - expected8).abs() <= off * numbers / denominator + 0.501 * steps + 1e-5).all()


@pytest.mark.parametrize("size", (16, 64, 80, 128, 512))
@pytest.mark.parametrize(
    ("tokens", "keys", "causal"), ((1, 1, True), (7, 50, True), (200, 531, True), (65, 300, False))
)
def test_16_bit(tokens: int, keys: int, causal: bool, size: int) -> None:
    """Of numbers that bf16 holds, only weights are rounded: by 2^-9 of them, above and below the line."""
    q, k, v = (x.bfloat16().float() for x in inputs(1, 4, 2, tokens, keys, size))
    expected, magnitude, _ = exact(q, k, v, mask(tokens, keys, causal, None, None, 0), size**-0.5)
    result = ops.attention(q, k, v, causal=causal)
    # fp32 elsewhere: `size` products of up to about 20 summed in each logit.
    logits = (q.abs().amax((0, 2)) * k.abs().amax((0, 2)).repeat_interleave(2, 0)).sum(-1).max()
    error = 2**-8 + 2 * float(logits) * size**-0.5 * (size / 16 + 4) * 2**-24 + 1e-5
    assert ((result - expected).abs() <= error * magnitude).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_16_bit_like_reference(dtype: torch.dtype) -> None:
    shapes = ((2, 4, 2, 7, 7, 64), (2, 2, 1, 130, 300, 80), (1, 2, 2, 5, 515, 96), (2, 2, 2, 200, 200, 32))
    for shape, (causal, window, bounded) in zip(
        itertools.cycle(shapes), itertools.product((True, False), (0, 40), (True, False)), strict=False
    ):
        q, k, v = inputs(*shape, dtype)
        q[0, 0, 1], v[0, 0, -1, 3] = float("nan"), float("inf")
        lengths = torch.randint(shape[4] // 2 + 1, shape[4] + 1, (shape[0],)) if bounded else None
        starts = None if lengths is None else lengths // 3
        arguments = (q, k, v, causal, shape[5] ** -0.5, starts, lengths, window)
        result, expected = call("attention", *arguments), reference("attention", *arguments)
        assert result.dtype == dtype and result.stride() == expected.stride()
        assert result.isnan().equal(expected.isnan())
        torch.testing.assert_close(result, expected, rtol=2**-7, atol=2**-7, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOATS)
def test_like_reference(dtype: torch.dtype) -> None:
    """Every way to mask and to round. One step of a code of K, where means differ in their last bit, is allowed for."""
    shapes = ((2, 4, 2, 7, 7, 64), (2, 2, 1, 130, 300, 80), (1, 2, 2, 5, 515, 96), (2, 2, 2, 200, 200, 32))
    ways = itertools.product((True, False), (True, False), (True, False), (0, 1), (0, 40), (True, False))
    for shape, (causal, per_token, smooth, pv, window, bounded) in zip(itertools.cycle(shapes), ways, strict=False):
        q, k, v = inputs(*shape, dtype)
        lengths = torch.randint(shape[4] // 2 + 1, shape[4] + 1, (shape[0],)) if bounded else None
        starts = None if lengths is None else lengths // 3
        arguments = (q, k, v, causal, shape[5] ** -0.5, starts, lengths, window, smooth, per_token, pv)
        result, expected = call("sage_attention", *arguments), reference("sage_attention", *arguments)
        assert result.dtype == dtype
        assert result.stride() == expected.stride()
        assert relative(result, expected.double()) < (4e-3 if pv else 2e-3), arguments[3:]
        assert (result.float() - expected.float()).abs().max() < (0.02 if pv else 8e-3), arguments[3:]


@pytest.mark.parametrize("pv", (0, 1))
def test_error_against_fp64(pv: int) -> None:
    q, k, v = inputs(1, 4, 2, 256, 700, 128)
    for per_token in (True, False):
        seen = mask(256, 700, True, None, None, 0)
        expected = exact(q, k, v, seen, 128**-0.5)[0]
        smooth = relative(ops.sage_attention(q, k, v, causal=True, pv=pv, per_token=per_token), expected)
        plain = relative(ops.sage_attention(q, k, v, causal=True, pv=pv, per_token=per_token, smooth_k=False), expected)
        assert smooth < (0.06 if pv else 0.02)
        assert plain > 1.2 * smooth


@pytest.mark.parametrize("pv", (0, 1))
def test_hidden_keys_may_hold_anything(pv: int) -> None:
    shape = (3, 2, 1, 70, 331, 64)
    lengths, starts = torch.tensor([331, 290, 0]), torch.tensor([5, 300, 0])
    for causal, window in ((True, 0), (False, 0), (True, 30)):
        q, k, v = inputs(*shape)
        seen = mask(70, 331, causal, starts, lengths, window)
        expected = exact(q, k, v, seen, 0.125)[0]
        for b in range(3):
            for x in (k, v):
                x[b, :, : starts[b]] = float("nan")
                x[b, :, lengths[b] :] = float("inf")
        result = ops.sage_attention(q, k, v, causal=causal, starts=starts, lengths=lengths, window=window, pv=pv)
        assert result[1:].eq(0).all()
        assert result[0].isfinite().all()
        assert relative(result[0], expected[0]) < (0.06 if pv else 0.02)
        assert result[0][:, ~seen[0].any(-1)].eq(0).all()


@pytest.mark.parametrize("pv", (0, 1))
@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_what_is_not_finite_shows(value: float, pv: int) -> None:
    clean = inputs(1, 4, 2, 100, 300, 64)
    plain = ops.sage_attention(*clean, causal=True, pv=pv)
    for which in (0, 1, 2):
        changed = [x.clone() for x in clean]
        changed[which][0, 1, 40 if which == 0 else 240, 7] = value
        result = ops.sage_attention(*changed, causal=True, pv=pv)
        lost = torch.zeros(4, 100, dtype=torch.bool)
        if which == 0:
            lost[1, 40] = True
        else:
            lost[2:, 40:] = True
        assert result.isnan().all(-1)[0].equal(lost)
        assert result.isnan().any(-1)[0].equal(lost)
        # K's mean is that of the other keys, V's scales, too.
        assert (result - plain)[0][~lost].abs().max() < 0.05


@pytest.mark.parametrize("dtype", FLOATS)
def test_strides_heads_and_threads(dtype: torch.dtype) -> None:
    q, k, v = inputs(2, 6, 2, 250, 310, 80, dtype)
    plain, wide = ops.sage_attention(q, k, v, causal=True), ops.attention(q, k, v, causal=True)
    assert plain.transpose(1, 2).is_contiguous()
    # As Transformers has them, and rows off any alignment.
    views = [
        torch.cat([x[..., :3], x, x[..., :2]], -1).transpose(1, 2).contiguous().transpose(1, 2)[..., 3:-2]
        for x in (q, k, v)
    ]
    assert ops.sage_attention(*views, causal=True).equal(plain)
    assert ops.attention(*views, causal=True).equal(wide)
    repeated = [x.repeat_interleave(3, 1) for x in (k, v)]
    assert ops.sage_attention(q, *repeated, causal=True).equal(plain)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert ops.sage_attention(q, k, v, causal=True).equal(plain)
            assert ops.attention(q, k, v, causal=True).equal(wide)
    finally:
        torch.set_num_threads(threads)


def test_extremes() -> None:
    q, k, v = inputs(1, 2, 2, 40, 40, 64)
    average = v.cumsum(2) / torch.arange(1, 41)[:, None]
    for zeros in ((q * 0, k), (q, k * 0), (q, torch.ones_like(k))):
        result = ops.sage_attention(*zeros, v, causal=True)
        torch.testing.assert_close(result, average, rtol=0, atol=2**-8 * float(v.abs().max()))
    # The largest logit alone counts.
    sharp = ops.sage_attention(q * 1e4, k * 1e4, v, causal=True)
    best = (q.double() @ k.double().transpose(2, 3)).masked_fill(~mask(40, 40, True, None, None, 0), -math.inf)
    close = (sharp - v.gather(2, best.argmax(-1, keepdim=True).expand(-1, -1, -1, 64))).abs().amax(-1) < 0.02
    assert close.float().mean() > 0.9
    assert sharp.isfinite().all()
    # Beyond fp32.
    assert ops.sage_attention(q * 1e30, k * 1e30, v, causal=False).isnan().all()


def test_empty() -> None:
    for shape in ((0, 2, 1, 3, 5, 16), (2, 2, 1, 0, 5, 16), (2, 0, 1, 3, 5, 16)):
        q, k, v = inputs(*shape)
        assert ops.sage_attention(q, k, v, causal=True).shape == q.shape
    q, k, v = inputs(1, 2, 1, 3, 0, 16)
    assert ops.sage_attention(q, k, v, causal=False).eq(0).all()


def test_refuses() -> None:
    q, k, v = inputs(2, 4, 2, 3, 5, 32)
    good: dict[str, Any] = dict(
        q=q, k=k, v=v, causal=True, scale=0.1, starts=None, lengths=None, window=0, smooth=True, per_token=True, pv=0
    )
    lengths = torch.tensor([1, 2])
    for message, change in (
        ("k must be 4-D", {"k": k[0]}),
        ("q must be float32, float16 or bfloat16", {"q": q.double()}),
        (r"k must be \[2, heads that divide 4, tokens, 32\], got \[2, 3, 5, 32\]", {"k": inputs(2, 3, 3, 3, 5, 32)[1]}),
        (r"v must have the shape of k \[2, 2, 5, 32\]", {"v": v[:, :, 1:]}),
        (
            "the head size must be a multiple of 16, at most 512, got 24",
            {"q": q[..., :24], "k": k[..., :24], "v": v[..., :24]},
        ),
        (r"v must be of q's dtype torch.float32, got torch.bfloat16", {"v": v.bfloat16()}),
        ("q must have no more tokens than k, got 3 and 2", {"k": k[:, :, :2], "v": v[:, :, :2]}),
        (r"lengths must be torch.int64 \[2\].*got torch.int32 \[2\]", {"lengths": lengths.int()}),
        (r"starts must be torch.int64 \[2\].*got torch.int64 \[1\]", {"starts": lengths[:1]}),
        ("scale must be positive and finite, got 0", {"scale": 0.0}),
        ("scale must be positive and finite, got nan", {"scale": float("nan")}),
        ("window must not be negative, got -1", {"window": -1}),
        (r"pv must be 0 \(16 bit\) or 1 \(int8\), got 2", {"pv": 2}),
    ):
        check_refused("sage_attention", message, *{**good, **change}.values())
    with pytest.raises(RuntimeError, match="k must have its last dimension contiguous"):
        ops.sage_attention(q, k.transpose(2, 3).contiguous().transpose(2, 3), v, causal=True)


def test_compiles() -> None:
    q, k, v = inputs(1, 2, 1, 3, 5, 16)
    q, k = torch.zeros_like(q), torch.zeros_like(k)  # sums are the same in any order
    v = torch.ones_like(v)
    check_compiles("sage_attention", q, k, v, True, 0.25, None, torch.tensor([5]), 0, True, True, 0)
    torch.library.opcheck(torch.ops.quantkit.attention.default, (q, k, v, True, 0.25, None, torch.tensor([5]), 0))
