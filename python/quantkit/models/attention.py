"""Causal attention on the CPU for calibration and for the loaded model, where PyTorch's fused one is slow: it reaches
80 GFLOP/s on rows of a few hundred tokens.

In bf16 it is `ops.attention`. In fp16, and where heads have sizes that it does not take, the scores of 128 queries at
a time are made by matrix products against the keys up to the last of them, which skips most of what causality masks
out, with grouped heads folded into the rows; scores and probabilities are rounded to the model's dtype, as
Transformers' own `eager` attention does. One query at a time, as in decoding, is two such products as well: PyTorch's
fused attention takes ten times as long there. Whatever is not plain causal attention goes to `sdpa`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import ConfigError

NAME = "quantkit_causal"
# In front of another attention's name: that one, with queries that go through a module's `quantize_query` first.
HOOKED = "quantkit_queries_"
BLOCK = 128


def register() -> str:
    """Make the attention known to Transformers; gives back the name for `attn_implementation`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, causal_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def round_queries(model: Any, module: nn.Module, quantizer: Callable[[Tensor], Tensor]) -> nn.Module:
    """From now on the queries of `module`, an attention of `model`, go through `quantizer` in front of what it attends
    with: [batch, heads, tokens, dim], after rotary embeddings. ConfigError for one that is not called by its name.
    """
    name = getattr(getattr(module, "config", None) or model.config, "_attn_implementation", None)
    if name != NAME and not str(name).startswith(HOOKED):
        model.set_attn_implementation(_hooked(model, module, str(name)))
    module.quantize_query = quantizer  # type: ignore[assignment]
    return module


def shows_queries(model: Any) -> bool:
    """Whether `model` calls its attention by a name, so that its queries can be seen."""
    return bool(getattr(model.config, "_attn_implementation", None) == NAME or model._can_set_attn_implementation())


@contextmanager
def watched_queries(model: Any, module: nn.Module, see: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the block `see` is given the queries of `module`, and gives back what is used."""
    round_queries(model, module, see)
    try:
        yield
    finally:
        del module.quantize_query


def _hooked(model: Any, module: nn.Module, name: str) -> str:
    """The name of attention `name` with queries that go through `quantize_query`."""
    from transformers import AttentionInterface, AttentionMaskInterface

    known, masks = AttentionInterface(), AttentionMaskInterface()
    plain = known.get(name, getattr(sys.modules[type(module).__module__], "eager_attention_forward", None))
    if plain is None or name not in masks or not shows_queries(model):
        raise ConfigError(
            f"{type(module).__name__}: attends by '{name}' in a way of its own, and not by Transformers' attention "
            "interface, so that its queries cannot be seen; keys and values are quantized by kv_cache_scheme"
        )

    def attend(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        rounded = getattr(module, "quantize_query", None)
        return plain(module, query if rounded is None else rounded(query), *args, **kwargs)

    AttentionInterface.register(HOOKED + name, attend)
    AttentionMaskInterface.register(HOOKED + name, masks[name])
    return HOOKED + name


def causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface: query [batch, heads, tokens, dim], key and value [batch, groups, tokens, dim]
    -> [batch, tokens, heads, dim]. A module with a `quantize_query` has its queries rounded by it first.
    """
    rounded = getattr(module, "quantize_query", None)
    query = query if rounded is None else rounded(query)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    odd = query.device.type != "cpu" or any(kwargs.get(k) is not None for k in ("position_bias", "softcap", "s_aux"))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    one = query.shape[2] == 1 and (attention_mask is None or attention_mask.dtype == torch.bool)
    if one and not odd and key.shape[2] > 0:
        return single(query, key, value, scale, attention_mask), None
    plain = attention_mask is None and causal and not odd
    if not plain or query.dtype == torch.float32 or query.shape[2] != key.shape[2]:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    if query.dtype == torch.bfloat16 and value.shape == key.shape and fits(query.shape[-1]):
        return ops.attention(query, key, value, causal=True, scale=scale).transpose(1, 2), None
    return blockwise(query, key, value, scale), None


def fits(size: int) -> bool:
    """Whether `ops.attention` takes heads of this size."""
    return size % 16 == 0 and 0 < size <= 512


def single(query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
    """Attention of one query to all keys, or those where `mask` (bool [batch, 1 or heads, 1, keys]) is true; shapes as
    in `causal_attention`.
    """
    batch, heads, _, dim = query.shape
    groups, keys = key.shape[1], key.shape[2]
    rows = (query * scaling).reshape(batch * groups, heads // groups, dim)
    scores = torch.bmm(rows, key.reshape(batch * groups, keys, dim).transpose(1, 2))
    if mask is not None:
        seen = mask.expand(batch, heads, 1, keys).reshape(batch * groups, heads // groups, keys)
        # Finite: a query that sees nothing is padding, and must not become NaN.
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    mixed = torch.bmm(torch.softmax(scores, -1), value.reshape(batch * groups, keys, value.shape[-1]))
    return mixed.reshape(batch, 1, heads, -1)


def blockwise(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Plain causal attention over blocks of BLOCK queries; shapes as in `causal_attention`."""
    batch, heads, tokens, dim = query.shape
    groups = key.shape[1]
    repeat = heads // groups
    keys = key.reshape(batch * groups, tokens, dim).transpose(1, 2)
    values = value.reshape(batch * groups, tokens, value.shape[-1])
    scaled = query * scaling
    out = query.new_empty(batch, tokens, heads, value.shape[-1])
    future = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=query.device).triu(1)
    for begin in range(0, tokens, BLOCK):
        end = min(begin + BLOCK, tokens)
        size = end - begin
        rows = scaled[:, :, begin:end].reshape(batch * groups, repeat * size, dim)
        scores = torch.bmm(rows, keys[:, :, :end]).view(batch * heads, size, end)
        scores[:, :, begin:].masked_fill_(future[:size, :size], float("-inf"))
        weights = torch.softmax(scores, -1).view(batch * groups, repeat * size, end)
        mixed = torch.bmm(weights, values[:, :end]).view(batch, heads, size, -1)
        out[:, begin:end] = mixed.transpose(1, 2)
    return out
