"""Experts as Linears: Transformers holds all experts of a layer in two 3-D parameters, checkpoints and quantized
formats hold each expert's projections as 2-D weights of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .experts_layout import ExpertsLayout, layout_of
from .fused_block import is_silu, silu_mul


class Expert(nn.Module):
    """Gate, up and down projection of one expert, under the names that the checkpoint uses."""

    def __init__(self, parts: tuple[str, str, str], layout: ExpertsLayout) -> None:
        super().__init__()
        self.parts = parts
        gate, up, down = parts
        options: dict[str, Any] = {"bias": layout.bias, "device": "meta", "dtype": layout.dtype}
        for part in (gate, up):
            self.add_module(part, nn.Linear(layout.hidden, layout.inner, **options))
        self.add_module(down, nn.Linear(layout.inner, layout.hidden, **options))

    def forward(self, x: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        gate, up, down = (self._modules[part] for part in self.parts)
        assert gate is not None and up is not None and down is not None
        result: Tensor = down(combine(gate(x), up(x)))
        return result


class Experts(nn.ModuleList):
    """Stands in for a fused experts module: same call, one `Expert` per expert, in the same order.

    `token_mask` (bool, one per token, None for all): tokens that are not real are sent to no expert, so that padding
    enters no expert's statistics; they get zeros. `all_tokens`: every expert runs on every real token, so that hooks on
    it see them; the output is that of the routed ones still. `stand_in` takes a call's place, its padding sent to
    expert `len(self)`, and gives what comes out: for when the experts are not there. `path`: the name in the model.
    """

    def __init__(self, fused: nn.Module, parts: tuple[str, str, str], name: str, path: str = "") -> None:
        layout = layout_of(fused, name)
        super().__init__(Expert(parts, layout) for _ in range(layout.experts))
        self.token_mask: Tensor | None = None
        self.all_tokens = False
        self.stand_in: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
        self.path = path
        # A class's own way to combine the two takes them as they lie in its parameter; the usual one is act(gate) * up.
        own: Any = getattr(fused, "_apply_gate", None)
        self._own_gate, self._turns = own is not None and own.__name__ != "_default_apply_gate", layout.turns
        # In a tuple, so that it is no submodule: its parameters are not this module's.
        self._fused = (fused,)

    def combine(self, gate: Tensor, up: Tensor) -> Tensor:
        """What enters the down projection."""
        fused: Any = self._fused[0]
        if not self._own_gate and is_silu(fused.act_fn):
            return silu_mul(gate, up)
        if not self._own_gate:
            plain: Tensor = fused.act_fn(gate) * up
            return plain
        both = torch.stack((gate, up), -1).flatten(-2) if self._turns else torch.cat((gate, up), dim=-1)
        combined: Tensor = fused._apply_gate(both)
        return combined

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, hidden], top_k_index and top_k_weights [tokens, k] -> [tokens, hidden]."""
        if self.token_mask is not None:
            top_k_index = top_k_index.masked_fill(~self.token_mask.unsqueeze(1), len(self))
        if self.stand_in is not None:
            return self.stand_in(hidden_states, top_k_index, top_k_weights)
        if self.all_tokens:
            everyone = hidden_states if self.token_mask is None else hidden_states[self.token_mask]
            return self._all(hidden_states, everyone, top_k_index, top_k_weights)
        out = torch.zeros_like(hidden_states)
        self.add(out, hidden_states, top_k_index, top_k_weights, range(len(self)))
        return out

    def add(
        self, out: Tensor, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, members: Sequence[int]
    ) -> None:
        """Add to `out` what the experts in `members` give, in their order; see `forward`. Experts in groups of any size
        give the same bits as all at once.
        """
        by_slot = top_k_index.t()
        for index in torch.unique(top_k_index).tolist():
            if index not in members:
                continue
            slot, token = torch.where(by_slot == index)
            result = self[index](hidden_states[token], self.combine)
            result = result * top_k_weights[token, slot, None]
            out.index_add_(0, token, result.to(out.dtype))

    def _all(self, hidden_states: Tensor, everyone: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        real = slice(None) if self.token_mask is None else self.token_mask
        for index, expert in enumerate(self):
            share = (top_k_weights * (top_k_index == index)).sum(1, keepdim=True)[real]
            out[real] += (expert(everyone, self.combine) * share).to(out.dtype)
        return out
