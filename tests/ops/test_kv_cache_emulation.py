"""The CUDA sources of the 8-bit KV cache, run on the CPU: codes bit for bit, attention on them against fp64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from quantkit import ops

from . import emulated_cuda
from .cpu_cases import FLOATS
from .cuda_cases import assert_same
from .test_kv_cache import CACHES, GRANULARITIES, caches, exact, scales, steps

pytestmark = pytest.mark.skipif(emulated_cuda.compiler() is None, reason="no C++ compiler: set CXX")


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("cache_dtype", CACHES, ids=str)
def test_append_and_read(emulated: Any, cache_dtype: torch.dtype, granularity: str) -> None:
    batch, heads, capacity, size = 2, 3, 40, 80
    for dtype in FLOATS:
        k, v = (torch.randn(batch, 7, heads, size + 3).to(dtype).transpose(1, 2)[..., 1:-2] for _ in range(2))
        k[0, 1, 2, 3], k[0, 2] = float("nan"), 0.0
        positions = torch.stack([torch.arange(5, 12), torch.tensor([39, 0, 3, -1, 7, 8, -1])])
        whole = torch.zeros(2, batch, heads + 1, capacity + 2, size, dtype=torch.uint8).view(cache_dtype)
        k_scale, v_scale = scales(granularity, batch, heads, capacity)
        args = (k, v, *(x[:, 1:, 2:] for x in whole), k_scale, v_scale, positions)
        found = emulated("kv_append", args)
        ops.kv_append(*args)
        # A view's copy has its strides; the numbers are compared.
        for one, other in zip(found, args[2:6], strict=True):
            assert_same("kv_append", one.contiguous(), other.contiguous())
        for begin, end in ((0, capacity), (5, 12), (3, 3)):
            read = (args[2], k_scale, begin, end, dtype)
            assert_same("kv_read", emulated("kv_read", read), torch.ops.quantkit.kv_read(*read))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("cache_dtype", CACHES, ids=str)
def test_attention(emulated: Any, cache_dtype: torch.dtype, granularity: str) -> None:
    shapes = (
        (1, 1, 1, 1, 1, 16),
        (2, 8, 2, 1, 300, 128),
        (1, 6, 2, 3, 530, 80),
        (1, 2, 2, 4, 70, 256),
        (1, 2, 1, 1, 70, 512),
    )
    ways = itertools.product((True, False), (0, 33), (True, False))
    for (batch, heads, kv_heads, tokens, capacity, size), dtype, (causal, window, bounded) in zip(
        shapes, itertools.cycle(FLOATS), ways, strict=False
    ):
        k, v = caches(batch, kv_heads, capacity, size, cache_dtype)
        k_scale, v_scale = scales(granularity, batch, kv_heads, capacity)
        q = (0.2 * torch.randn(batch, heads, tokens, size)).to(dtype)
        lengths = torch.randint(min(tokens, capacity), capacity + 1, (batch,)) if bounded else None
        starts = None if lengths is None else lengths // 4
        seen = torch.zeros(batch, 1, tokens, capacity, dtype=torch.bool)
        for b, t in itertools.product(range(batch), range(tokens)):
            length = capacity if lengths is None else int(lengths[b])
            place = length - tokens + t
            first = max(0 if starts is None else int(starts[b]), place - window + 1 if window else 0)
            seen[b, :, t, first : place + 1 if causal else length] = True
        wide_k, wide_v = k.double() * steps(k_scale), v.double() * steps(v_scale)
        expected, magnitude = exact(q, wide_k, wide_v, 0.1, seen)
        result = emulated("kv_attention", (q, k, v, k_scale, v_scale, causal, 0.1, starts, lengths, window))
        assert result.dtype == dtype and result.transpose(1, 2).is_contiguous()
        own = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
        error = (result.double() - expected).abs()
        assert (error <= (2e-4 + own) * magnitude + 1e-6).all(), (size, causal, window, float(error.max()))


@pytest.mark.parametrize("cache_dtype", CACHES, ids=str)
def test_beyond_lengths_anything_may_be(emulated: Any, cache_dtype: torch.dtype) -> None:
    k, v = caches(1, 2, 100, 32, cache_dtype)
    k_scale, v_scale = scales("token", 1, 2, 100)
    q, lengths, starts = torch.randn(1, 2, 3, 32), torch.tensor([60]), torch.tensor([20])

    def run() -> torch.Tensor:
        found: torch.Tensor = emulated("kv_attention", (q, k, v, k_scale, v_scale, True, 0.1, starts, lengths, 0))
        return found

    plain = run()
    for x in (k.view(torch.uint8), v.view(torch.uint8)):
        x[:, :, :20] = x[:, :, 60:] = 127
    for x in (k_scale, v_scale):
        x[:, :, :20] = x[:, :, 60:] = float("nan")
    assert run().equal(plain)
    k_scale[0, 1, 59] = float("nan")  # query 0 stands at key 57, and does not see 59
    result = run()
    assert result[0, 1, 2].isnan().all() and result[:, :, :2].equal(plain[:, :, :2]) and result[:, 0].equal(plain[:, 0])
    k_scale[0, 1, 59] = 0.01
    v_scale[0, 0, 59] = float("nan")
    result = run()
    assert result[0, 0, 2].isnan().all() and result[:, :, :2].equal(plain[:, :, :2])


def test_empty_and_refused(emulated: Any) -> None:
    k, v = caches(2, 2, 5, 16, torch.int8)
    scale = torch.ones(1)
    for q in (torch.zeros(2, 2, 0, 16), torch.zeros(2, 0, 1, 16)):
        assert emulated("kv_attention", (q, k, v, scale, scale, True, 0.1, None, None, 0)).shape == q.shape
    q = torch.ones(2, 2, 1, 16)
    nothing = emulated("kv_attention", (q, k, v, scale, scale, True, 0.1, None, torch.tensor([0, 5]), 0))
    assert nothing[0].eq(0).all() and nothing[1].ne(0).any()
    other = v.view(torch.float8_e4m3fn)
    for words, args in (
        (
            "v_cache must be of k_cache's dtype",
            (q, k, other, scale, scale, True, 0.1, None, None, 0),
        ),
        (r"v_scale must be torch.float32", (q, k, v, scale, scale.double(), True, 0.1, None, None, 0)),
        ("scale must be positive", (q, k, v, scale, scale, True, -1.0, None, None, 0)),
    ):
        with pytest.raises(RuntimeError, match=f"quantkit::kv_attention: .*{words}"):
            emulated("kv_attention", args)
