"""Experts as Linears: Transformers holds all experts of a layer in two 3-D parameters, checkpoints and quantized
formats hold each expert's projections as 2-D weights of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .fused_block import is_silu, silu_mul


def is_fused(module: nn.Module) -> bool:
    """Whether `module` holds the experts of a layer as 3-D parameters."""
    down = module._parameters.get("down_proj")
    return down is not None and down.dim() == 3


class Expert(nn.Module):
    """Gate, up and down projection of one expert, under the names that the checkpoint uses."""

    def __init__(self, parts: tuple[str, str, str], hidden: int, intermediate: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.parts = parts
        gate, up, down = parts
        for part in (gate, up):
            self.add_module(part, nn.Linear(hidden, intermediate, bias=False, device="meta", dtype=dtype))
        self.add_module(down, nn.Linear(intermediate, hidden, bias=False, device="meta", dtype=dtype))

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
        gate_up, down = check_fused(fused, name)
        super().__init__(Expert(parts, down.shape[1], down.shape[2], gate_up.dtype) for _ in range(down.shape[0]))
        self.token_mask: Tensor | None = None
        self.all_tokens = False
        self.stand_in: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
        self.path = path
        # A class's own way to combine the two takes them concatenated; the usual one is act(gate) * up.
        self._own_gate = fused._apply_gate.__name__ != "_default_apply_gate"  # type: ignore[union-attr]
        # In a tuple, so that it is no submodule: its parameters are not this module's.
        self._fused = (fused,)

    def combine(self, gate: Tensor, up: Tensor) -> Tensor:
        """What enters the down projection."""
        fused: Any = self._fused[0]
        if not self._own_gate and is_silu(fused.act_fn):
            return silu_mul(gate, up)
        combined: Tensor = (
            fused._apply_gate(torch.cat((gate, up), dim=-1)) if self._own_gate else fused.act_fn(gate) * up
        )
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


def check_fused(fused: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """The two parameters of a fused experts module whose layout is the common one; CheckpointError otherwise."""
    kind = type(fused).__name__
    odd = [flag for flag in ("is_transposed", "has_bias", "has_post_expert_norm") if getattr(fused, flag, False)]
    odd += [f"not {flag}" for flag in ("is_concatenated", "has_gate") if not getattr(fused, flag, True)]
    odd += [] if hasattr(fused, "_apply_gate") else ["no _apply_gate, Transformers' interface for experts"]
    gate_up, down = fused._parameters.get("gate_up_proj"), fused._parameters.get("down_proj")
    extra = sorted(set(dict(fused.named_parameters())) - {"gate_up_proj", "down_proj"})
    if gate_up is None or down is None or odd or extra:
        why = ", ".join(odd + [f"parameter {e}" for e in extra]) or "no gate_up_proj"
        raise CheckpointError(
            f"{name}: experts of class {kind} cannot be split into Linears ({why}); quantkit splits "
            "gate_up_proj [experts, 2 x intermediate, hidden] with down_proj [experts, hidden, intermediate]. "
            "Schemes that need no calibration data work without it"
        )
    if gate_up.shape[1] != 2 * down.shape[2] or gate_up.shape[2] != down.shape[1]:
        raise CheckpointError(
            f"{name}: experts of class {kind} have gate_up_proj {list(gate_up.shape)} and down_proj "
            f"{list(down.shape)}, which do not fit together as [experts, 2 x intermediate, hidden] and "
            "[experts, hidden, intermediate]"
        )
    return gate_up, down
