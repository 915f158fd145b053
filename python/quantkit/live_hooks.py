"""Forward-pre-hooks that make a model in memory compute what a server will: inputs of Linears, and keys and values in
the cache, rounded to what their codes can hold.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .config.schemes import QuantizationArgs
from .formats.source import Quantizer, cache_quantizer, fake_quantize


class InputQuantizer:
    """For a Linear. `scale` [1, 1] and `zero_point` of static activations; None: computed from each input."""

    def __init__(self, args: QuantizationArgs, scale: Tensor | None, zero_point: Tensor | None) -> None:
        self.args, self.scale, self.zero_point = args, scale, zero_point

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x: Tensor = inputs[0]
        if x.numel() == 0:
            return inputs
        if self.scale is not None and self.scale.device != x.device:
            self.scale = self.scale.to(x.device)
            self.zero_point = None if self.zero_point is None else self.zero_point.to(x.device)
        return (fake_quantize(x, self.args, self.scale, self.zero_point), *inputs[1:])


class CacheQuantizer:
    """For an attention module, registered `with_kwargs`: it gets a cache that rounds what is put into it. Scales are
    fp32 [1], [heads], or [heads * head size] per channel. `rounders`: what rounds keys and values, if not these.
    """

    def __init__(
        self,
        args: QuantizationArgs,
        keys: Tensor,
        values: Tensor,
        rounders: tuple[Quantizer, Quantizer] | None = None,
    ) -> None:
        self.args, self.scales = args, (keys, values)
        self.keys, self.values = rounders or (cache_quantizer(args, keys), cache_quantizer(args, values))

    @property
    def has_codes(self) -> bool:
        """Whether a `QuantizedCache` can hold codes with these scales."""
        return self.args.strategy != "channel"

    def __call__(
        self, module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        cache = kwargs.get("past_key_values")
        # A cache of codes with these scales rounds by itself.
        if cache is not None and not getattr(cache, "holds_codes", False):
            kwargs = {**kwargs, "past_key_values": _RoundingCache(cache, self)}
        return inputs, kwargs

    def rounded(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """keys, values [rows, heads, tokens, head size] as the cache holds them."""
        return self.keys(keys), self.values(values)


class _RoundingCache:
    """A cache of Transformers whose `update` rounds first; all else is the cache's own."""

    def __init__(self, cache: Any, quantizer: CacheQuantizer) -> None:
        self._cache, self._quantizer = cache, quantizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self._cache.update(*self._quantizer.rounded(keys, values), *args, **kwargs)
        return found
