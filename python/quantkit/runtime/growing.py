"""Transformers' dynamic cache without its copies: a token is written behind the others, into memory that doubles when
it is full. `torch.cat`, which Transformers calls at every step, moves the whole cache each time.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

LEAST = 256  # tokens to make room for


class GrowingLayer(DynamicLayer):
    """One layer. `keys` and `values` are, as ever, the tokens that there are: views of larger memory. Whoever replaces
    them (beams in another order, say) is noticed, and what they put there is copied once.
    """

    _room: tuple[Tensor, Tensor] | None = None
    _seen: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        used = self.get_seq_length()
        end = used + key_states.shape[-2]
        room = self._room
        own = (
            room is not None
            and self.keys is not None
            and self.keys is self._seen
            and self.keys.data_ptr() == room[0].data_ptr()
        )
        if room is None or not own or end > room[0].shape[-2]:
            room = self._grown(key_states, used, end), self._grown(value_states, used, end)
            if used and self.keys is not None and self.values is not None:
                room[0][:, :, :used], room[1][:, :, :used] = self.keys, self.values
            self._room = room
        room[0][:, :, used:end], room[1][:, :, used:end] = key_states, value_states
        self.keys, self.values = room[0][:, :, :end], room[1][:, :, :end]
        self._seen = self.keys
        return self.keys, self.values

    def _grown(self, states: Tensor, used: int, end: int) -> Tensor:
        batch, heads, _, size = states.shape
        return states.new_empty((batch, heads, max(LEAST, 2 * used, end + LEAST // 4), size))

    def reset(self) -> None:
        super().reset()
        self._room = self._seen = None


def growing(cache: DynamicCache) -> DynamicCache:
    """`cache`, new, with GrowingLayers where it has plain ones."""
    make: Any = GrowingLayer
    cache.layers = [make() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
