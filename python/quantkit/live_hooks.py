"""Forward-pre-hooks that make a model in memory compute what a server will: inputs of Linears, and keys and values in
the cache, rounded to what their codes can hold.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from .config.schemes import QuantizationArgs
from .formats.source import fake_quantize


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
    fp32 [1], or [heads].
    """

    def __init__(self, args: QuantizationArgs, keys: Tensor, values: Tensor) -> None:
        by_head = args.strategy == "attn_head"
        # A row of codes for each head; scales of their own are what rows have in strategy "channel".
        self.args = replace(args, strategy="channel" if by_head else "tensor")
        self.scales = (keys.reshape(-1, 1), values.reshape(-1, 1))

    def __call__(
        self, module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        cache = kwargs.get("past_key_values")
        if cache is not None:
            kwargs = {**kwargs, "past_key_values": _RoundingCache(cache, self)}
        return inputs, kwargs

    def rounded(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """keys, values [rows, heads, tokens, head size] as the cache holds them."""
        return self._round(keys, self.scales[0]), self._round(values, self.scales[1])

    def _round(self, x: Tensor, scale: Tensor) -> Tensor:
        by_head = x.transpose(0, 1)
        flat = by_head.reshape(by_head.shape[0], -1)
        return fake_quantize(flat, self.args, scale.to(x.device)).reshape(by_head.shape).transpose(0, 1)


class _RoundingCache:
    """A cache of Transformers whose `update` rounds first; all else is the cache's own."""

    def __init__(self, cache: Any, quantizer: CacheQuantizer) -> None:
        self._cache, self._quantizer = cache, quantizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self._cache.update(*self._quantizer.rounded(keys, values), *args, **kwargs)
        return found
