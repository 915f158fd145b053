"""An 8-bit cache of keys and values: quantize and append, read back, and attention on the codes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._library import check_float, declare
from .attention import check_bounds, check_heads, check_softmax, empty_output, visible_keys
from .scale import MIN_SCALE

CACHE_MAX = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def _check_cache(op: str, name: str, cache: Tensor, scale: Tensor) -> None:
    """A cache [B, H, capacity, D] and its scale."""
    torch._check(
        cache.dtype in CACHE_MAX,
        lambda: f"quantkit::{op}: {name}_cache must be int8 or float8_e4m3fn, got {cache.dtype}",
    )
    torch._check(
        cache.dim() == 4,
        lambda: f"quantkit::{op}: {name}_cache must be 4-D [batch, heads, capacity, head size], got {cache.dim()}-D",
    )
    batch, heads, capacity, _ = cache.shape
    torch._check(
        scale.dtype == torch.float32 and tuple(scale.shape) in ((1,), (heads,), (batch, heads, capacity)),
        lambda: (
            f"quantkit::{op}: {name}_scale must be torch.float32 [1], [{heads}] for each head, or "
            f"[{batch}, {heads}, {capacity}] for each token, got {scale.dtype} {list(scale.shape)}"
        ),
    )
    torch._check(
        scale.is_contiguous(),
        lambda: f"quantkit::{op}: {name}_scale must be contiguous, got strides {list(scale.stride())}",
    )


def _expand(scale: Tensor) -> Tensor:
    """A scale [1], [H] or [B, H, capacity] for a cache [B, H, capacity, D]."""
    return scale[:, None, None] if scale.dim() == 1 else scale[..., None]


# ---- kv_append ----
def _check_append(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor, v_scale: Tensor, positions: Tensor
) -> None:
    op = "kv_append"
    for name, x, cache, scale in (("k", k, k_cache, k_scale), ("v", v, v_cache, v_scale)):
        check_float(op, name, x)
        _check_cache(op, name, cache, scale)
        expected = (cache.shape[0], cache.shape[1], positions.shape[-1] if positions.dim() else 0, cache.shape[3])
        torch._check(
            tuple(x.shape) == expected,
            lambda name=name, x=x, expected=expected: (
                f"quantkit::{op}: {name} must be {list(expected)} for this cache and these positions, "
                f"got {list(x.shape)}"
            ),
        )
    torch._check(
        positions.dtype == torch.int64 and positions.dim() == 2 and positions.shape[0] == k_cache.shape[0],
        lambda: (
            f"quantkit::{op}: positions must be torch.int64 [{k_cache.shape[0]}, new tokens], "
            f"got {positions.dtype} {list(positions.shape)}"
        ),
    )


def _append_fake(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor, v_scale: Tensor, positions: Tensor
) -> None:
    _check_append(k, v, k_cache, v_cache, k_scale, v_scale, positions)


def _append_reference(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor, v_scale: Tensor, positions: Tensor
) -> None:
    _check_append(k, v, k_cache, v_cache, k_scale, v_scale, positions)
    if positions.numel() == 0:
        return
    for b, row in enumerate(positions.tolist()):
        kept = [t for t, position in enumerate(row) if position >= 0]
        places = [row[t] for t in kept]
        for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
            torch._check(
                not places or max(places) < cache.shape[2],
                lambda cache=cache, places=places: (
                    f"quantkit::kv_append: positions must be below the capacity {cache.shape[2]}, got {max(places)}"
                ),
            )
            new = x[b][:, kept].float()
            limit = CACHE_MAX[cache.dtype]
            if scale.dim() == 3:
                step = (new.abs().amax(-1, keepdim=True) / limit).clamp(min=MIN_SCALE[torch.float32])
                scale[b][:, places] = step[..., 0]
            else:
                step = scale[:, None, None]
            codes = new * (1.0 / step)
            if cache.dtype == torch.int8:
                codes = torch.round(codes).nan_to_num(nan=0.0)
            codes = codes.clamp(-limit, limit)
            cache[b][:, places] = codes.to(cache.dtype)


_append = declare(
    "kv_append(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) k_scale, Tensor(d!) v_scale, "
    "Tensor positions) -> ()",
    fake=_append_fake,
    reference=_append_reference,
)


# ---- kv_read ----
def _check_read(cache: Tensor, scale: Tensor, begin: int, end: int, dtype: torch.dtype) -> None:
    op = "kv_read"
    _check_cache(op, "kv", cache, scale)
    torch._check(
        0 <= begin <= end <= cache.shape[2],
        lambda: f"quantkit::{op}: [begin, end) must lie within the capacity {cache.shape[2]}, got [{begin}, {end})",
    )
    torch._check(
        dtype in (torch.float32, torch.float16, torch.bfloat16),
        lambda: f"quantkit::{op}: dtype must be float32, float16 or bfloat16, got {dtype}",
    )


def _read_fake(cache: Tensor, scale: Tensor, begin: int, end: int, dtype: torch.dtype) -> Tensor:
    _check_read(cache, scale, begin, end, dtype)
    batch, heads, _, size = cache.shape
    return cache.new_empty((batch, heads, end - begin, size), dtype=dtype)


def _read_reference(cache: Tensor, scale: Tensor, begin: int, end: int, dtype: torch.dtype) -> Tensor:
    _check_read(cache, scale, begin, end, dtype)
    steps = _expand(scale)
    steps = steps[:, :, begin:end] if scale.dim() == 3 else steps
    return (cache[:, :, begin:end].float() * steps).to(dtype).contiguous()


_read = declare(
    "kv_read(Tensor cache, Tensor scale, int begin, int end, ScalarType dtype) -> Tensor",
    fake=_read_fake,
    reference=_read_reference,
)


# ---- kv_attention ----
def _check_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    scale: float,
    starts: Tensor | None,
    lengths: Tensor | None,
    window: int,
) -> None:
    op = "kv_attention"
    check_heads(op, q, k_cache, v_cache, ("k_cache", "v_cache"))
    _check_cache(op, "k", k_cache, k_scale)
    _check_cache(op, "v", v_cache, v_scale)
    torch._check(
        v_cache.dtype == k_cache.dtype,
        lambda: f"quantkit::{op}: v_cache must be of k_cache's dtype {k_cache.dtype}, got {v_cache.dtype}",
    )
    check_bounds(op, q.shape[0], starts, lengths)
    check_softmax(op, scale, window)


def _attention_fake(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    causal: bool,
    scale: float,
    starts: Tensor | None,
    lengths: Tensor | None,
    window: int,
) -> Tensor:
    _check_attention(q, k_cache, v_cache, k_scale, v_scale, scale, starts, lengths, window)
    return empty_output(q)


def _attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    causal: bool,
    scale: float,
    starts: Tensor | None,
    lengths: Tensor | None,
    window: int,
) -> Tensor:
    _check_attention(q, k_cache, v_cache, k_scale, v_scale, scale, starts, lengths, window)
    batch, heads, tokens, size = q.shape
    kv_heads, keys = k_cache.shape[1], k_cache.shape[2]
    out = empty_output(q)
    if q.numel() == 0:
        return out
    if keys == 0:
        return out.zero_()
    last = torch.full((batch,), keys, device=q.device) if lengths is None else lengths
    seen = visible_keys((batch, tokens, keys), last - 1, causal, starts, last, window)
    # What nobody sees may hold anything.
    used = seen.any(1)[:, None, :, None]
    k = (k_cache.float() * _expand(k_scale)).masked_fill(~used, 0.0)
    v = (v_cache.float() * _expand(v_scale)).masked_fill(~used, 0.0)
    group = heads // kv_heads
    rows = q.float().reshape(batch, kv_heads, group * tokens, size)
    visible = seen[:, None].repeat(1, 1, group, 1)
    logits = (rows @ k.transpose(2, 3) * scale).masked_fill(~visible, -math.inf)
    weights = torch.softmax(logits, -1).masked_fill(~visible.any(-1, keepdim=True), 0.0)
    return out.copy_((weights @ v).reshape(q.shape))


_attention = declare(
    "kv_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor k_scale, Tensor v_scale, bool causal, float scale, "
    "Tensor? starts, Tensor? lengths, int window) -> Tensor",
    fake=_attention_fake,
    reference=_attention_reference,
)


def kv_append(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor, v_scale: Tensor, positions: Tensor
) -> None:
    """Quantize new keys and values into their places of a cache, in place.

    k, v [B, H, T, D] fp32, fp16 or bf16 (last dimension contiguous); caches int8 or float8_e4m3fn [B, H, capacity, D],
    dense but for the strides of their first two dimensions; `positions` int64 [B, T] (any strides): where each token
    goes; a negative one is left out, one beyond the capacity refused (on CUDA, where the host does not wait to look at
    them, left out). Two tokens of a batch row must not share a place.

    Scales are fp32. [1] (a tensor) and [H] (each head) are given and stay: codes are those of `quantize_int` in
    [-127, 127] or of `quantize_fp8`, as what `kv_cache_scheme` of a checkpoint means and `quantkit eval` computes.
    [B, H, capacity] (each token) is written too: amax / 127 or amax / 448 of the token's D numbers; its int8 codes lie
    in [-127, 127]. NaN becomes the code of zero in int8; a NaN scale keeps it where tokens have their own.
    """
    _append(k, v, k_cache, v_cache, k_scale, v_scale, positions)


def kv_read(
    cache: Tensor, scale: Tensor, *, begin: int = 0, end: int | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Tokens [begin, end) of a cache [B, H, capacity, D] as numbers: code * scale in fp32, rounded to `dtype`."""
    return _read(cache, scale, begin, cache.shape[2] if end is None else end, dtype)


def kv_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    window: int = 0,
) -> Tensor:
    """softmax(scale q k^T) v on an 8-bit cache, as if it were read back first: for decoding and short prefills.

    q [B, Hq, T, D] fp32, fp16 or bf16; caches and scales as in `kv_append`, of one dtype; Hq a multiple of the cache's
    heads. Gives [B, Hq, T, D] of q's dtype, a view of a contiguous [B, T, Hq, D].

    `lengths` int64 [B] says how many tokens a row of the cache holds, those of q among them (without it, the
    capacity): query t stands at position p = lengths[b] - T + t and, if `causal`, sees keys j <= p; with `window`, j >
    p - window; with `starts` (int64 [B]), j >= starts[b]. A query that sees no key gives zeros.

    Queries, codes and weights take part in fp32 precision: the cache's rounding is the only one. Memory beyond
    `lengths` is never read. The result is the same for any number of threads.
    """
    factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    return _attention(q, k_cache, v_cache, k_scale, v_scale, causal, factor, starts, lengths, window)
