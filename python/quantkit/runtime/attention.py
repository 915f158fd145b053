"""quantkit's attention in Transformers models.

After `quantkit.register_attention()`, which `quantkit.load` calls, `model.set_attn_implementation("quantkit_sage")`
gives a model INT8 attention for prefills and exact attention for decoding steps. `QuantizedCache` (cache.py) holds keys
and values in 8 bit, and this attention reads the codes themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)

from .. import ops
from ..errors import ConfigError
from ..models.attention import single
from .cache import CachedStates

NAME = "quantkit_sage"
# So few queries are not worth quantizing all keys for: they attend in the model's dtype, or on the cache's codes.
FEW_QUERIES = 8
INSTEAD = "model.set_attn_implementation('sdpa') or 'eager' does it"


@dataclass(frozen=True)
class SeenKeys:
    """What the mask says, in numbers. Of the first `keys` keys, query t of T stands at key `keys` - T + t, and sees
    those from `starts` to `lengths` (int64 [batch]; None: all), up to itself if `causal`, the last `window` of them if
    not 0.
    """

    keys: int | None  # None: all
    causal: bool = True
    window: int = 0
    starts: Tensor | None = None
    lengths: Tensor | None = None

    # `generate` makes masks for caches of fixed size itself: it calls this, and the model then asks for the dimensions.
    ndim = 4

    def contiguous(self) -> SeenKeys:
        return self

    def dense(self, batch: int, tokens: int, keys: int, device: torch.device | str) -> Tensor:
        """bool [batch, 1, tokens, keys]."""
        key = torch.arange(keys, device=device)
        place = torch.arange(tokens, device=device)[:, None] + (keys if self.keys is None else self.keys) - tokens
        seen = torch.ones((batch, 1, tokens, keys), dtype=torch.bool, device=device)
        if self.causal:
            seen = seen & (key <= place)
        if self.window:
            seen = seen & (key > place - self.window)
        if self.starts is not None:
            seen = seen & (key >= self.starts[:, None, None, None])
        if self.lengths is not None:
            seen = seen & (key < self.lengths[:, None, None, None])
        return seen


def sage_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | SeenKeys | None = None,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> SeenKeys:
    """Transformers' mask interface: causal and bidirectional masks, sliding windows, and padding on either side. Any
    other mask (packed sequences, chunks, images) is a ConfigError.
    """
    if isinstance(attention_mask, SeenKeys):
        return attention_mask
    starts = lengths = None
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        padding = padding[:, kv_offset : kv_offset + kv_length].bool()
        if not bool(padding.all()):
            starts, lengths = _bounds(padding)
    keys = int(q_offset) - kv_offset + q_length
    if mask_function is bidirectional_mask_function:
        return SeenKeys(None, False, 0, starts, lengths)
    seen = SeenKeys(keys, True, 0, starts, lengths)
    if mask_function is not causal_mask_function:
        # A closure tells nothing of itself: what it makes has to be what the numbers say.
        seen = replace(seen, window=local_size or 0)
        asked = sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,  # type: ignore[arg-type]
            kv_offset,
            mask_function,
            attention_mask,
            allow_is_causal_skip=False,
            use_vmap=kwargs.get("use_vmap", False),
            device=device,
        )
        if asked is None or not torch.equal(
            asked.expand(batch_size, 1, -1, -1), seen.dense(batch_size, q_length, kv_length, device)
        ):
            raise ConfigError(
                f"'{NAME}' attention: this model's mask is not causal, a sliding window or padding alone (packed "
                f"sequences, chunks or images?); {INSTEAD}"
            )
    if keys > kv_length:
        raise ConfigError(
            f"'{NAME}' attention: queries stand at keys up to {keys}, beyond the {kv_length} that there are"
        )
    return seen


def _bounds(padding: Tensor) -> tuple[Tensor, Tensor]:
    """First key and end of the keys, of bool [batch, keys]."""
    place = torch.arange(padding.shape[1], device=padding.device)
    starts = torch.where(padding, place, padding.shape[1]).amin(1)
    lengths = torch.where(padding, place + 1, 0).amax(1)
    starts = torch.minimum(starts, lengths)  # a row of padding alone
    if not bool((lengths - starts == padding.sum(1)).all()):
        raise ConfigError(
            f"'{NAME}' attention: the attention mask has padding between tokens (prompts padded on the right, then "
            f"generated from?); pad on the left, or {INSTEAD}"
        )
    return starts, lengths


def sage_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor | CachedStates,
    value: Tensor | CachedStates,
    attention_mask: SeenKeys | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface. query [B, Hq, T, D]; key and value [B, Hkv, S, D], or what QuantizedCache
    gives. Gives [B, T, Hq, D].
    """
    _refuse(query, attention_mask, dropout, kwargs)
    if isinstance(attention_mask, SeenKeys):
        seen = attention_mask
    else:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        seen = SeenKeys(None, bool(causal), sliding_window or 0)
    if isinstance(key, CachedStates):
        assert isinstance(value, CachedStates)
        out = _on_codes(query, key, value, seen, scaling)
    else:
        assert isinstance(value, Tensor)
        out = _on_numbers(query, key, value, seen, scaling)
    return out.transpose(1, 2).contiguous(), None


def _refuse(query: Tensor, mask: Any, dropout: float, kwargs: dict[str, Any]) -> None:
    """ConfigError for whatever would not be computed."""
    reason = None
    if isinstance(mask, Tensor):
        reason = f"a mask of its own, {list(mask.shape)}, is not computed"
    elif dropout:
        reason = f"dropout ({dropout}) is not computed; model.eval() turns it off"
    elif torch.is_grad_enabled() and query.requires_grad:
        reason = "there are no gradients; use torch.no_grad()"
    else:
        for name in ("softcap", "position_bias", "s_aux", "cache", "head_mask", "cu_seq_lens_q"):
            if kwargs.get(name) is not None:
                reason = f"'{name}' is not computed"
        if kwargs.get("output_attentions"):
            reason = "there are no attention weights to give back (output_attentions)"
    if reason is not None:
        raise ConfigError(f"'{NAME}' attention: {reason}; {INSTEAD}")


def _on_numbers(query: Tensor, key: Tensor, value: Tensor, seen: SeenKeys, scaling: float | None) -> Tensor:
    tokens = query.shape[2]
    if seen.keys is not None and seen.keys < key.shape[2]:
        key, value = key[:, :, : seen.keys], value[:, :, : seen.keys]
        seen = replace(seen, lengths=None if seen.lengths is None else seen.lengths.clamp(max=seen.keys))
    if tokens > FEW_QUERIES:
        return ops.sage_attention(
            query,
            key,
            value,
            causal=seen.causal,
            scale=scaling,
            starts=seen.starts,
            lengths=seen.lengths,
            window=seen.window,
        )
    mask = None
    if tokens > 1 or seen.window or seen.starts is not None:
        mask = seen.dense(query.shape[0], tokens, key.shape[2], query.device)
    if tokens == 1 and key.shape[2] > 0:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return single(query, key, value, scale, mask).transpose(1, 2)
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out if mask is None else out.masked_fill(~mask.any(-1, keepdim=True), 0.0)


def _on_codes(query: Tensor, key: CachedStates, value: CachedStates, seen: SeenKeys, scaling: float | None) -> Tensor:
    tokens, keys = query.shape[2], key.shape[2]
    # kv_attention counts positions from the end of the keys; padding after them is for the other one.
    fits = (seen.keys is None or seen.keys == keys) and (
        seen.lengths is None or bool(((seen.lengths == keys) | (seen.lengths == 0)).all())
    )
    if tokens > FEW_QUERIES or not fits:
        return _on_numbers(query, key.read(query.dtype), value.read(query.dtype), seen, scaling)
    lengths = torch.full((query.shape[0],), keys, device=query.device)
    starts = seen.starts
    if starts is not None and seen.lengths is not None:  # a row of padding alone sees nothing
        starts = torch.where(seen.lengths == 0, keys, starts)
    return ops.kv_attention(
        query,
        key.codes,
        value.codes,
        key.scale,
        value.scale,
        causal=seen.causal,
        scale=scaling,
        lengths=lengths,
        starts=starts,
        window=seen.window,
    )


def register_attention() -> None:
    """Make "quantkit_sage" known to Transformers, for `attn_implementation` and `set_attn_implementation`: an
    attention, and the masks that go with it.

    Prefills of more than 8 tokens run on `ops.sage_attention`; fewer queries attend in the model's dtype, or on the
    codes of a `QuantizedCache` (`ops.kv_attention`). Causal and bidirectional attention, sliding windows and padding on
    either side are computed; ConfigError for all else: dropout, gradients, soft caps, masks of one's own, packed
    sequences.
    """
    AttentionInterface.register(NAME, sage_attention_forward)
    AttentionMaskInterface.register(NAME, sage_mask)
