"""The 8-bit KV cache: codes bit for bit, attention on them against fp64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import quantkit.ops as ops
from quantkit.config.schemes import QuantizationArgs
from quantkit.formats.source import cache_quantizer

from .cpu_cases import FLOATS, call, check_refused, reference

CACHES = (torch.int8, torch.float8_e4m3fn)
GRANULARITIES = ("tensor", "head", "token")


def caches(batch: int, heads: int, capacity: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Random codes, all of them, the two kinds of e4m3 NaN left out."""
    codes = torch.randint(-128, 128, (2, batch, heads, capacity, size)).to(torch.int8)
    if dtype is torch.int8:
        return codes[0], codes[1]
    codes[(codes & 127) == 127] = 1
    return codes.view(dtype)[0], codes.view(dtype)[1]


def scales(granularity: str, batch: int, heads: int, capacity: int) -> tuple[Tensor, Tensor]:
    shape = {"tensor": (1,), "head": (heads,), "token": (batch, heads, capacity)}[granularity]
    return 0.01 + 0.02 * torch.rand(shape), 0.01 + 0.02 * torch.rand(shape)


def steps(scale: Tensor) -> Tensor:
    return scale[:, None, None] if scale.dim() == 1 else scale[..., None]


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Tensor) -> tuple[Tensor, Tensor]:
    """In fp64, and what it would be of |q|, |k| and |v|: rounding of products and sums is relative to that."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    logits = (q.double() @ k.transpose(2, 3) * scale).masked_fill(~seen, -math.inf)
    weights = torch.softmax(logits, -1).nan_to_num(nan=0.0)
    return weights @ v, weights @ v.abs()


def bits(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.element_size() == 1 else x.view(torch.int32)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("cache_dtype", CACHES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_append_and_read_like_reference(dtype: torch.dtype, cache_dtype: torch.dtype, granularity: str) -> None:
    batch, heads, capacity, size = 2, 3, 40, 80
    k, v = (torch.randn(batch, 7, heads, size + 3).to(dtype).transpose(1, 2)[..., 1:-2] for _ in range(2))
    k[0, 1, 2, 3], k[0, 2] = float("nan"), 0.0
    positions = torch.stack([torch.arange(5, 12), torch.tensor([39, 0, 3, -1, 7, 8, -1])])
    whole = [torch.zeros(batch, heads + 1, capacity + 2, size, dtype=torch.uint8).view(cache_dtype) for _ in range(4)]
    views = [x[:, 1:, 2:] for x in whole]
    k_scale, v_scale = scales(granularity, batch, heads, capacity)
    expected_scales = k_scale.clone(), v_scale.clone()
    ops.kv_append(k, v, *views[:2], k_scale, v_scale, positions)
    reference("kv_append", k, v, *views[2:], *expected_scales, positions)
    for result, expected in zip((*whole[:2], k_scale, v_scale), (*whole[2:], *expected_scales), strict=True):
        assert bits(result).equal(bits(expected))
    for begin, end in ((0, capacity), (5, 12), (3, 3)):
        for out in FLOATS:
            read = call("kv_read", views[0], k_scale, begin, end, out)
            torch.testing.assert_close(
                read, reference("kv_read", views[0], k_scale, begin, end, out), rtol=0, atol=0, equal_nan=True
            )


@pytest.mark.parametrize("kind", ("int", "float"))
@pytest.mark.parametrize("strategy", ("tensor", "attn_head"))
def test_same_numbers_as_eval(strategy: str, kind: str) -> None:
    """A static cache holds what `quantkit eval` computes for a checkpoint's kv_cache_scheme."""
    args = QuantizationArgs(num_bits=8, type=kind, strategy=strategy)
    k, v = torch.randn(2, 1, 4, 9, 64).bfloat16()
    scale = torch.rand(4 if strategy == "attn_head" else 1) * 0.02 + 0.002
    dtype = torch.int8 if kind == "int" else torch.float8_e4m3fn
    cache = [torch.zeros(1, 4, 9, 64, dtype=torch.uint8).view(dtype) for _ in range(2)]
    ops.kv_append(k, v, *cache, scale, scale, torch.arange(9)[None])
    quantize = cache_quantizer(args, scale)
    for x, codes in ((k, cache[0]), (v, cache[1])):
        assert ops.kv_read(codes, scale, dtype=torch.bfloat16).equal(quantize(x))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("cache_dtype", CACHES)
def test_attention_like_fp64(cache_dtype: torch.dtype, granularity: str) -> None:
    shapes = (
        (1, 1, 1, 1, 1, 16),
        (2, 8, 2, 1, 700, 128),
        (2, 6, 2, 3, 530, 80),
        (1, 5, 1, 2, 1100, 96),
        (1, 2, 2, 4, 70, 256),
    )
    for batch, heads, kv_heads, tokens, capacity, size in shapes:
        k, v = caches(batch, kv_heads, capacity, size, cache_dtype)
        k_scale, v_scale = scales(granularity, batch, kv_heads, capacity)
        q = 0.2 * torch.randn(batch, heads, tokens, size)
        wide_k, wide_v = k.double() * steps(k_scale), v.double() * steps(v_scale)
        ways = itertools.product((True, False), (0, 33), (True, False))
        for dtype, (causal, window, bounded) in zip(itertools.cycle(FLOATS), ways, strict=False):
            query = q.to(dtype)
            lengths = torch.randint(min(tokens, capacity), capacity + 1, (batch,)) if bounded else None
            starts = None if lengths is None else lengths // 4
            seen = torch.zeros(batch, 1, tokens, capacity, dtype=torch.bool)
            for b, t in itertools.product(range(batch), range(tokens)):
                length = capacity if lengths is None else int(lengths[b])
                place = length - tokens + t
                first = max(0 if starts is None else int(starts[b]), place - window + 1 if window else 0)
                seen[b, :, t, first : place + 1 if causal else length] = True
            expected, magnitude = exact(query, wide_k, wide_v, 0.1, seen)
            result = ops.kv_attention(
                query, k, v, k_scale, v_scale, causal=causal, scale=0.1, lengths=lengths, starts=starts, window=window
            )
            assert result.dtype == dtype
            assert result.transpose(1, 2).is_contiguous()
            # Logits of at most 200, within 2^-22 of that; the result's own rounding.
            own = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
            error = (result.double() - expected).abs()
            assert (error <= (2e-4 + own) * magnitude + 1e-6).all(), (dtype, causal, window, error.max())


@pytest.mark.parametrize("cache_dtype", CACHES)
def test_beyond_lengths_anything_may_be(cache_dtype: torch.dtype) -> None:
    k, v = caches(1, 2, 100, 32, cache_dtype)
    k_scale, v_scale = scales("token", 1, 2, 100)
    q, lengths, starts = torch.randn(1, 2, 3, 32), torch.tensor([60]), torch.tensor([20])
    plain = ops.kv_attention(q, k, v, k_scale, v_scale, lengths=lengths, starts=starts)
    for x in (k.view(torch.uint8), v.view(torch.uint8)):
        x[:, :, :20] = x[:, :, 60:] = 127
    for x in (k_scale, v_scale):
        x[:, :, :20] = x[:, :, 60:] = float("nan")
    assert ops.kv_attention(q, k, v, k_scale, v_scale, lengths=lengths, starts=starts).equal(plain)
    # Query 0 stands at key 57, and does not see 59.
    k_scale[0, 1, 59] = float("nan")
    result = ops.kv_attention(q, k, v, k_scale, v_scale, lengths=lengths, starts=starts)
    assert result[0, 1, 2].isnan().all()
    assert result[:, :, :2].equal(plain[:, :, :2])
    assert result[:, 0].equal(plain[:, 0])


def test_fp8_nan_and_queries_show() -> None:
    k, v = caches(1, 2, 700, 48, torch.float8_e4m3fn)
    scale, q = torch.tensor([0.01]), torch.randn(1, 4, 1, 48)
    for cache, channels in ((k, slice(None)), (v, 7)):
        codes = cache.view(torch.uint8)
        old = int(codes[0, 1, 650, 7])
        for nan in (0x7F, 0xFF):
            codes[0, 1, 650, 7] = nan
            result = ops.kv_attention(q, k, v, scale, scale)
            assert result[0, 2:, :, channels].isnan().all()
            assert result[0, :2].isfinite().all()
        codes[0, 1, 650, 7] = old
    q[0, 3, 0, 5] = float("nan")
    result = ops.kv_attention(q, k, v, scale, scale)
    assert result[0, 3].isnan().all()
    assert result[0, :3].isfinite().all()


def test_strides_and_threads() -> None:
    k, v = caches(2, 2, 1300, 64, torch.int8)
    scale, q = torch.tensor([0.01, 0.02]), torch.randn(2, 6, 2, 64)
    lengths = torch.tensor([1300, 900])
    plain = ops.kv_attention(q, k, v, scale, scale, lengths=lengths)
    wide = [torch.cat([x, x], -1).transpose(1, 2).contiguous().transpose(1, 2)[..., 64:] for x in (q, k, v)]
    assert ops.kv_attention(*wide, scale, scale, lengths=lengths).equal(plain)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert ops.kv_attention(q, k, v, scale, scale, lengths=lengths).equal(plain)
    finally:
        torch.set_num_threads(threads)


def test_empty() -> None:
    k, v = caches(2, 2, 5, 16, torch.int8)
    scale = torch.ones(1)
    for q in (torch.zeros(2, 2, 0, 16), torch.zeros(2, 0, 1, 16)):
        assert ops.kv_attention(q, k, v, scale, scale).shape == q.shape
    nothing = ops.kv_attention(torch.ones(2, 2, 1, 16), k, v, scale, scale, lengths=torch.tensor([0, 5]))
    assert nothing[0].eq(0).all()
    assert nothing[1].ne(0).any()
    assert ops.kv_attention(torch.ones(2, 2, 1, 16), k[:, :, :0], v[:, :, :0], scale, scale).eq(0).all()
    new = torch.zeros(2, 2, 0, 16)
    ops.kv_append(new, new, k, v, scale, scale, torch.zeros(2, 0, dtype=torch.int64))
    assert ops.kv_read(k, scale, begin=2, end=2).shape == (2, 2, 0, 16)


def test_refuses() -> None:
    k, v = caches(2, 2, 5, 32, torch.int8)
    scale, new, positions = torch.ones(2), torch.zeros(2, 2, 3, 32), torch.zeros(2, 3, dtype=torch.int64)
    good: dict[str, Any] = dict(k=new, v=new, k_cache=k, v_cache=v, k_scale=scale, v_scale=scale, positions=positions)
    for message, change in (
        (r"k must be \[2, 2, 3, 32\] for this cache and these positions, got \[2, 2, 2, 32\]", {"k": new[:, :, 1:]}),
        ("v must be float32, float16 or bfloat16, got torch.int8", {"v": v[:, :, :3]}),
        ("k_cache must be int8 or float8_e4m3fn, got torch.uint8", {"k_cache": k.view(torch.uint8)}),
        (
            r"v_scale must be torch.float32 \[1\], \[2\] for each head, or \[2, 2, 5\].*got torch.float32 \[3\]",
            {"v_scale": torch.ones(3)},
        ),
        ("k_scale must be contiguous", {"k_scale": torch.ones(2, 2, 10)[..., ::2]}),
        (r"positions must be torch.int64 \[2, new tokens\], got torch.int32", {"positions": positions.int()}),
        ("positions must be below the capacity 5, got 5", {"positions": positions + 5}),
    ):
        check_refused("kv_append", message, *{**good, **change}.values())
    check_refused(
        "kv_read", r"\[begin, end\) must lie within the capacity 5, got \[2, 6\)", k, scale, 2, 6, torch.float32
    )
    check_refused("kv_read", "dtype must be float32, float16 or bfloat16", k, scale, 0, 1, torch.int8)
    q = torch.zeros(2, 4, 1, 32)
    attend: dict[str, Any] = dict(
        q=q, k=k, v=v, k_scale=scale, v_scale=scale, causal=True, scale=0.1, starts=None, lengths=None, window=0
    )
    for message, change in (
        (r"k_cache must be \[2, heads that divide 3, tokens, 32\]", {"q": q[:, :3]}),
        ("v_cache must be of k_cache's dtype torch.int8, got torch.float8", {"v": v.view(torch.float8_e4m3fn)}),
        (r"v_scale must be torch.float32", {"v_scale": scale.double()}),
        ("scale must be positive", {"scale": -1.0}),
        (r"lengths must be torch.int64 \[2\]", {"lengths": positions[0]}),
    ):
        check_refused("kv_attention", message, *{**attend, **change}.values())


def test_compiles() -> None:
    k, v = caches(1, 2, 5, 16, torch.int8)
    scale, new, positions = torch.ones(1, 2, 5), torch.ones(1, 2, 3, 16), torch.arange(3)[None]
    overloads = torch.ops.quantkit
    torch.library.opcheck(overloads.kv_append.default, (new, new, k, v, scale, scale.clone(), positions))
    torch.library.opcheck(overloads.kv_read.default, (k, scale, 1, 4, torch.bfloat16))
    arguments = (torch.ones(1, 4, 1, 16), k, v, scale, scale, True, 0.25, None, torch.tensor([3]), 0)
    torch.library.opcheck(overloads.kv_attention.default, arguments)
    torch.compiler.reset()
    compiled = torch.compile(overloads.kv_attention.default, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), reference("kv_attention", *arguments))
