"""Attention in blocks of keys with an online softmax in fp32: with INT8 products, after SageAttention
(arXiv:2410.02367; keys smoothed, queries and keys in int8, the product with the values in bf16 or int8), or with all
products in bf16 (FlashAttention, arXiv:2205.14135).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._library import check_float, declare
from .scale import MIN_SCALE

KEY_BLOCK = 256  # keys of one step of the online softmax
SCALE_BLOCK = 64  # tokens that share a scale, unless each has its own
MAX_HEAD_SIZE = 512


def check_heads(op: str, q: Tensor, k: Tensor, v: Tensor, names: tuple[str, str]) -> None:
    """What every attention asks of its shapes; `names` are those of k and v."""
    for name, x in (("q", q), (names[0], k), (names[1], v)):
        torch._check(
            x.dim() == 4,
            lambda name=name, x=x: (
                f"quantkit::{op}: {name} must be 4-D [batch, heads, tokens, head size], got {x.dim()}-D"
            ),
        )
    check_float(op, "q", q)
    batch, heads, _, size = q.shape
    torch._check(
        k.shape[0] == batch and k.shape[3] == size and k.shape[1] > 0 and heads % k.shape[1] == 0,
        lambda: (
            f"quantkit::{op}: {names[0]} must be [{batch}, heads that divide {heads}, tokens, {size}], "
            f"got {list(k.shape)}"
        ),
    )
    torch._check(
        v.shape == k.shape,
        lambda: f"quantkit::{op}: {names[1]} must have the shape of {names[0]} {list(k.shape)}, got {list(v.shape)}",
    )
    torch._check(
        size % 16 == 0 and 0 < size <= MAX_HEAD_SIZE,
        lambda: f"quantkit::{op}: the head size must be a multiple of 16, at most {MAX_HEAD_SIZE}, got {size}",
    )


def check_bounds(op: str, batch: int, starts: Tensor | None, lengths: Tensor | None) -> None:
    for name, x in (("starts", starts), ("lengths", lengths)):
        torch._check(
            x is None or (x.dtype == torch.int64 and tuple(x.shape) == (batch,)),
            lambda name=name, x=x: (
                f"quantkit::{op}: {name} must be torch.int64 [{batch}], a number per batch row, "
                f"got {x.dtype} {list(x.shape)}"
            ),
        )


def check_softmax(op: str, scale: float, window: int) -> None:
    torch._check(
        math.isfinite(scale) and scale > 0, lambda: f"quantkit::{op}: scale must be positive and finite, got {scale}"
    )
    torch._check(window >= 0, lambda: f"quantkit::{op}: window must not be negative, got {window}")


def visible_keys(
    shape: tuple[int, int, int], last: Tensor, causal: bool, starts: Tensor | None, lengths: Tensor | None, window: int
) -> Tensor:
    """bool [batch, T, S] for `shape` = (batch, T, S): which keys each query sees. The last query of batch row b stands
    at key `last[b]`.
    """
    batch, tokens, keys = shape
    key = torch.arange(keys, device=last.device)
    position = last[:, None, None] - (tokens - 1) + torch.arange(tokens, device=last.device)[:, None]
    seen = torch.ones((batch, tokens, keys), dtype=torch.bool, device=last.device)
    if causal:
        seen = seen & (key <= position)
    if window:
        seen = seen & (key > position - window)
    if starts is not None:
        seen = seen & (key >= starts[:, None, None])
    if lengths is not None:
        seen = seen & (key < lengths[:, None, None])
    return seen


def _check(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    starts: Tensor | None,
    lengths: Tensor | None,
    window: int,
    pv: int = 0,
) -> None:
    check_heads(op, q, k, v, ("k", "v"))
    for name, x in (("k", k), ("v", v)):
        torch._check(
            x.dtype == q.dtype,
            lambda name=name, x=x: f"quantkit::{op}: {name} must be of q's dtype {q.dtype}, got {x.dtype}",
        )
    torch._check(
        q.shape[2] <= k.shape[2] or not (causal or window),
        lambda: (
            f"quantkit::{op}: with causal or window, q must have no more tokens than k, "
            f"got {q.shape[2]} and {k.shape[2]}"
        ),
    )
    check_bounds(op, q.shape[0], starts, lengths)
    check_softmax(op, scale, window)
    torch._check(pv in (0, 1), lambda: f"quantkit::{op}: pv must be 0 (16 bit) or 1 (int8), got {pv}")


def empty_output(q: Tensor) -> Tensor:
    """[B, H, T, D] as a view of [B, T, H, D], which is how the projection after it reads it."""
    batch, heads, tokens, size = q.shape
    return q.new_empty((batch, tokens, heads, size)).transpose(1, 2)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    starts: Tensor | None,
    lengths: Tensor | None,
    window: int,
    smooth_k: bool,
    per_token: bool,
    pv: int,
) -> Tensor:
    _check("sage_attention", q, k, v, causal, scale, starts, lengths, window, pv)
    return empty_output(q)


def _codes(x: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes of x, as fp32 numbers, and their scales."""
    scale = (amax / 127.0).clamp(min=MIN_SCALE[torch.float32])
    return torch.round(x * (1.0 / scale)).clamp(-127, 127), scale


def _token_codes(x: Tensor, per_token: bool) -> tuple[Tensor, Tensor]:
    """Codes of x [..., tokens, D] and scales [..., tokens, 1]."""
    amax = x.abs().amax(-1, keepdim=True)
    if not per_token:
        tokens = x.shape[-2]
        padded = torch.nn.functional.pad(amax[..., 0], (0, -tokens % SCALE_BLOCK))
        blocks = padded.unflatten(-1, (-1, SCALE_BLOCK)).amax(-1)
        amax = blocks.repeat_interleave(SCALE_BLOCK, -1)[..., :tokens, None]
    return _codes(x, amax)


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    starts: Tensor | None,
    lengths: Tensor | None,
    window: int,
    smooth_k: bool,
    per_token: bool,
    pv: int,
) -> Tensor:
    _check("sage_attention", q, k, v, causal, scale, starts, lengths, window, pv)
    return _attend(q, k, v, causal, scale, starts, lengths, window, smooth_k, per_token, pv)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    starts: Tensor | None,
    lengths: Tensor | None,
    window: int,
    smooth_k: bool,
    per_token: bool | None,
    pv: int,
) -> Tensor:
    """`per_token` None: queries and keys in bf16."""
    batch, heads, tokens, size = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    out = empty_output(q)
    if q.numel() == 0:
        return out
    if keys == 0:
        return out.zero_()
    last = torch.full((batch,), keys - 1, device=q.device)
    valid = visible_keys((batch, 1, keys), last, False, starts, lengths, 0)[:, 0]
    seen = visible_keys((batch, tokens, keys), last, causal, starts, lengths, window)

    # Rows with anything that is not finite count as zeros, and make NaN of what sees them.
    wide, keys32, values = q.float(), k.float(), v.float()
    bad_query = ~wide.isfinite().all(-1)
    bad_key = ~(keys32.isfinite().all(-1) & values.isfinite().all(-1)) & valid[:, None]
    counts = valid[:, None] & ~bad_key
    wide = wide.masked_fill(bad_query[..., None], 0.0)
    keys32 = keys32.masked_fill(~counts[..., None], 0.0)
    values = values.masked_fill(~counts[..., None], 0.0)
    if smooth_k:
        mean = keys32.sum(2, keepdim=True) / counts.sum(2).clamp(min=1)[..., None, None]
        keys32 = (keys32 - mean).masked_fill(~counts[..., None], 0.0)
    if per_token is None:
        k_codes, q_codes = keys32.bfloat16().float(), wide.bfloat16().float()
        k_scale, q_scale = torch.ones_like(keys32[..., :1]), torch.ones_like(wide[..., :1])
    else:
        k_codes, k_scale = _token_codes(keys32, per_token)
        q_codes, q_scale = _token_codes(wide, per_token)
    if pv:
        values, v_scale = _codes(values, values.abs().amax(2, keepdim=True))
    else:
        values, v_scale = values.bfloat16().float(), values.new_ones(())

    group = heads // kv_heads
    rows = (batch, kv_heads, group * tokens, -1)
    factor = (q_scale * (scale * math.log2(math.e))).reshape(rows)
    dots, visible = q_codes.reshape(rows), seen[:, None].repeat(1, 1, group, 1)
    peak = factor.new_full(factor.shape, -math.inf)
    total = torch.zeros_like(factor)
    sums = factor.new_zeros((batch, kv_heads, group * tokens, size))
    for first in range(0, keys, KEY_BLOCK):
        part = slice(first, min(keys, first + KEY_BLOCK))
        # Products and sums of codes are integers below 2^24: exact in fp32.
        logits = (dots @ k_codes[:, :, part].transpose(2, 3)) * k_scale[:, :, part].transpose(2, 3) * factor
        logits = logits.masked_fill(~visible[..., part], -math.inf)
        new_peak = torch.maximum(peak, logits.amax(-1, keepdim=True))
        base = new_peak.masked_fill(new_peak == -math.inf, 0.0)
        weights = torch.exp2(logits - base)
        weights = torch.round(weights * 127.0) if pv else weights.bfloat16().float()
        decay = torch.exp2(peak - base)
        total = total * decay + weights.sum(-1, keepdim=True)
        sums = sums * decay + weights @ values[:, :, part]
        peak = new_peak
    result = sums / total * v_scale
    nothing = ~visible.any(-1, keepdim=True)
    result = result.masked_fill(nothing, 0.0).reshape(q.shape)
    poisoned = (seen[:, None] & bad_key[:, :, None]).any(-1).repeat_interleave(group, 1) | bad_query
    return out.copy_(result.masked_fill((poisoned & seen.any(-1)[:, None])[..., None], math.nan))


_sage = declare(
    "sage_attention(Tensor q, Tensor k, Tensor v, bool causal, float scale, Tensor? starts, Tensor? lengths, "
    "int window, bool smooth_k, bool per_token, int pv) -> Tensor",
    fake=_fake,
    reference=_reference,
)


def _attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    starts: Tensor | None,
    lengths: Tensor | None,
    window: int,
) -> Tensor:
    _check("attention", q, k, v, causal, scale, starts, lengths, window)
    return empty_output(q)


def _attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    starts: Tensor | None,
    lengths: Tensor | None,
    window: int,
) -> Tensor:
    _check("attention", q, k, v, causal, scale, starts, lengths, window)
    return _attend(q, k, v, causal, scale, starts, lengths, window, False, None, 0)


_attention = declare(
    "attention(Tensor q, Tensor k, Tensor v, bool causal, float scale, Tensor? starts, Tensor? lengths, int window)"
    " -> Tensor",
    fake=_attention_fake,
    reference=_attention_reference,
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    window: int = 0,
) -> Tensor:
    """softmax(scale q k^T) v without quantization: q, k, v and the softmax's numerators rounded to bf16, sums and all
    else in fp32. Arguments and what is seen are those of `sage_attention`, and so is what NaN and infinities do.
    """
    factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    return _attention(q, k, v, causal, factor, starts, lengths, window)


def sage_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    window: int = 0,
    smooth_k: bool = True,
    per_token: bool = True,
    pv: int = 0,
) -> Tensor:
    """softmax(scale q k^T) v with INT8 products of queries and keys, as in SageAttention (arXiv:2410.02367).

    q [B, Hq, T, D], k and v [B, Hkv, S, D]: fp32, fp16 or bf16, one dtype; the last dimension contiguous, other
    strides free. Hq is a multiple of Hkv (grouped queries; nothing is copied), D a multiple of 16 up to 512. Gives [B,
    Hq, T, D] of that dtype, a view of a contiguous [B, T, Hq, D].

    `scale` is 1 / sqrt(D) if not given. Query t sees key j if all of these hold:
    starts[b] <= j < lengths[b] (int64 [B]; without them 0 and S): valid keys, the same for all queries of a batch row;
    j <= t + S - T if `causal`: the last query sees all keys, and T <= S;
    j > t + S - T - window if `window` is not 0 (a sliding window).
    A query that sees no key gives zeros.

    Queries and keys are rounded to int8 with fp32 scales amax / 127, one for each token or, with `per_token=False`,
    one for each block of 64 tokens; their products are summed exactly, in int32. `smooth_k` first takes each channel's
    mean over the valid keys off the keys, which changes no softmax and removes what K has in common. The softmax is
    fp32. `pv=0` rounds its numerators and v to bf16 and sums in fp32. `pv=1` rounds numerators to int8 with the scale
    1 / 127 and v to int8 with a scale for each channel: faster, and coarse where attention is spread over many keys.
    The denominator is the sum of the rounded numerators, so that weights add up to one.

    A NaN or an infinity in a query makes its result NaN; in a key or value, that of every query that sees it. The
    result is the same for any number of threads.
    """
    factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    return _sage(q, k, v, causal, factor, starts, lengths, window, smooth_k, per_token, pv)
