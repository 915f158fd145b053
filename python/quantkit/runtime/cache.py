"""A cache of keys and values in 8 bit, in Transformers' cache interface."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .. import ops
from ..errors import ConfigError
from ..live_hooks import CacheQuantizer

DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
Scales = tuple[Tensor, Tensor]


class CachedStates:
    """Keys or values as their codes [B, H, capacity, D], of which the first `length` tokens count. quantkit's attention
    takes them as they are; nothing else can.
    """

    def __init__(self, codes: Tensor, scale: Tensor, length: int, dtype: torch.dtype) -> None:
        self.codes, self.scale, self.length, self.dtype = codes, scale, length, dtype

    @property
    def shape(self) -> torch.Size:
        batch, heads, _, size = self.codes.shape
        return torch.Size((batch, heads, self.length, size))

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def read(self, dtype: torch.dtype) -> Tensor:
        """As numbers [B, H, length, D]."""
        return ops.kv_read(self.codes, self.scale, end=self.length, dtype=dtype)


class QuantizedCacheLayer(CacheLayerMixin):
    """One layer's codes and scales, in memory that doubles when it is full."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False
    keys: Any
    values: Any
    key_scale: Any = None
    value_scale: Any = None

    def __init__(self, dtype: torch.dtype, scales: Scales | None, capacity: int, config: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.code_dtype, self.static, self.capacity, self.config = dtype, scales, capacity, config
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads, tokens, size = key_states.shape
        shape = (batch, heads, max(self.capacity, tokens), size)
        self.keys, self.values = (torch.empty(shape, dtype=self.code_dtype, device=self.device) for _ in range(2))
        if self.static is None:
            self.key_scale, self.value_scale = (torch.empty(shape[:3], device=self.device) for _ in range(2))
        else:
            for name, scale in zip(("keys", "values"), self.static, strict=True):
                if scale.numel() not in (1, heads):
                    raise ConfigError(f"QuantizedCache: {scale.numel()} scales of {name}, for {heads} heads")
            self.key_scale, self.value_scale = (
                s.reshape(-1).to(self.device, torch.float32).contiguous() for s in self.static
            )
        self.is_initialized = True

    def _map(self, change: Any) -> None:
        """All that is stored for each token, as `change` makes it."""
        self.keys, self.values = change(self.keys), change(self.values)
        if self.static is None:
            self.key_scale, self.value_scale = change(self.key_scale), change(self.value_scale)

    def _reserve(self, tokens: int) -> None:
        capacity = self.keys.shape[2]
        if tokens <= capacity:
            return

        def grown(x: Tensor) -> Tensor:
            larger = x.new_empty((*x.shape[:2], max(tokens, 2 * capacity), *x.shape[3:]))
            larger[:, :, : self.length] = x[:, :, : self.length]
            return larger

        self._map(grown)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch, _, tokens, _ = key_states.shape
        self._reserve(self.length + tokens)
        positions = torch.arange(self.length, self.length + tokens, device=self.device).expand(batch, -1)
        ops.kv_append(key_states, value_states, self.keys, self.values, self.key_scale, self.value_scale, positions)
        self.length += tokens
        both = tuple(
            CachedStates(codes, scale, self.length, self.dtype)
            for codes, scale in ((self.keys, self.key_scale), (self.values, self.value_scale))
        )
        if getattr(self.config, "_attn_implementation", None) == "quantkit_sage":
            return both[0], both[1]
        return both[0].read(self.dtype), both[1].read(self.dtype)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.keys = self.values = self.key_scale = self.value_scale = None
        self.is_initialized, self.length = False, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -`tokens_to_remove` tokens."""
        if tokens_to_remove > 0:
            raise ConfigError(
                f"QuantizedCache.crop: give a negative number of tokens to remove, not {tokens_to_remove}"
            )
        self.length = max(0, self.length + tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.is_initialized:
            self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self._map(lambda x: x[indices])

    @property
    def nbytes(self) -> int:
        """Memory that is held, scales included."""
        if not self.is_initialized:
            return 0
        held: int = sum(x.nbytes for x in (self.keys, self.values, self.key_scale, self.value_scale))
        return held


class QuantizedCache(Cache):
    """Keys and values in 8 bit: `model.generate(..., past_key_values=QuantizedCache(model.config))`.

    `dtype`: "int8" or "fp8" (e4m3). Scales are those of each token and head, amax / 127 or / 448, taken as tokens come;
    or given and fixed: `scales` maps a layer's index to those of its keys and values, fp32 [1] or [heads], as a
    checkpoint's kv_cache_scheme has them (`QuantizedCache.of` finds them in a model that quantkit loaded or
    calibrated). `capacity`: tokens to make room for at first; the memory doubles when it is full.

    With the attention "quantkit_sage" decoding reads the codes themselves. Any other attention gets them read back as
    numbers of the model's dtype, all of them at every step. Layers with sliding windows keep all their tokens.
    ConfigError if the model has layers that are no attention.
    """

    holds_codes = True

    def __init__(
        self,
        config: Any,
        dtype: str = "int8",
        *,
        scales: Mapping[int, Scales] | None = None,
        capacity: int = 256,
    ) -> None:
        if dtype not in DTYPES:
            raise ConfigError(f"QuantizedCache: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        config = config.get_text_config(decoder=True)
        kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        if kinds:
            raise ConfigError(
                f"QuantizedCache: layers of kind {', '.join(sorted(kinds))} have no keys and values to hold"
            )
        count = config.num_hidden_layers
        unknown = sorted(set(scales or ()) - set(range(count)))
        if scales is not None and (unknown or len(scales) != count):
            raise ConfigError(
                f"QuantizedCache: scales for {len(scales)} layers, of {count}; name each of 0 to {count - 1}"
            )
        make = partial(QuantizedCacheLayer, DTYPES[dtype], capacity=max(1, capacity), config=config)
        super().__init__(layers=[make(scales=None if scales is None else scales[i]) for i in range(count)])

    @classmethod
    def of(cls, model: Any, *, capacity: int = 256) -> QuantizedCache:
        """With the scales that quantkit has calibrated or loaded for this model's cache. ConfigError if it has none."""
        scales, kinds = {}, set()
        for module in model.modules():
            for hook in module._forward_pre_hooks.values():
                if isinstance(hook, CacheQuantizer):
                    if not hook.has_codes:
                        raise ConfigError(
                            "QuantizedCache.of: this model's cache has scales per channel, which no kernel reads; "
                            "without it keys and values are rounded as an NPU rounds them"
                        )
                    scales[int(module.layer_idx)] = hook.scales
                    kinds.add("fp8" if hook.args.type == "float" else "int8")
        if not scales:
            raise ConfigError(
                "QuantizedCache.of: this model has no scales of a KV cache; QuantizedCache(model.config) has its own"
            )
        return cls(model.config, kinds.pop(), scales=scales, capacity=capacity)

    @property
    def nbytes(self) -> int:
        """Memory that all layers hold."""
        layers: list[Any] = self.layers
        return sum(layer.nbytes for layer in layers)
