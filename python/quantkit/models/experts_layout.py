"""How a Transformers class holds all experts of a layer in 3-D parameters."""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError

# Without Transformers' interface for experts: called with tokens times their scores, once for each expert.
LLAMA4 = "Llama4TextExperts"


@dataclass(frozen=True)
class ExpertsLayout:
    """Of one layer: so many `experts` from `hidden` to `inner` channels and back. `transposed`: matrices are [in, out].
    `bias`: every Linear has one. `turns`: gate's and up's outputs alternate, instead of one half each.
    """

    experts: int
    hidden: int
    inner: int
    dtype: torch.dtype
    transposed: bool = False
    bias: bool = False
    turns: bool = False

    @property
    def plain(self) -> bool:
        """Whether each expert's matrices are a Linear's, in memory as they are."""
        return not (self.transposed or self.bias or self.turns)


def is_fused(module: nn.Module) -> bool:
    """Whether `module` holds the experts of a layer as 3-D parameters."""
    down = module._parameters.get("down_proj")
    return down is not None and down.dim() == 3


def layout_of(fused: nn.Module, name: str) -> ExpertsLayout:
    """That of `fused`; CheckpointError if its experts are not gate, up and down projections."""
    kind = type(fused).__name__
    llama4 = kind == LLAMA4
    transposed, bias = llama4 or bool(getattr(fused, "is_transposed", False)), bool(getattr(fused, "has_bias", False))
    turns = not getattr(fused, "is_concatenated", True)
    odd = [flag for flag in ("has_post_expert_norm",) if getattr(fused, flag, False)]
    odd += ["not has_gate"] if not getattr(fused, "has_gate", True) else []
    odd += [] if llama4 or hasattr(fused, "_apply_gate") else ["no _apply_gate, Transformers' interface for experts"]
    gate_up, down = fused._parameters.get("gate_up_proj"), fused._parameters.get("down_proj")
    known = {"gate_up_proj", "down_proj", *(("gate_up_proj_bias", "down_proj_bias") if bias else ())}
    extra = sorted(set(dict(fused.named_parameters())) - known)
    if gate_up is None or down is None or odd or extra:
        why = ", ".join(odd + [f"parameter {e}" for e in extra]) or "no gate_up_proj"
        raise CheckpointError(
            f"{name}: experts of class {kind} cannot be split into Linears ({why}); quantkit splits "
            "gate_up_proj [experts, 2 x intermediate, hidden] with down_proj [experts, hidden, intermediate]. "
            "Schemes that need no calibration data work without it"
        )
    hidden, inner = (down.shape[2], down.shape[1]) if transposed else (down.shape[1], down.shape[2])
    if tuple(gate_up.shape[1:]) != ((hidden, 2 * inner) if transposed else (2 * inner, hidden)):
        raise CheckpointError(
            f"{name}: experts of class {kind} have gate_up_proj {list(gate_up.shape)} and down_proj "
            f"{list(down.shape)}, which do not fit together as [experts, 2 x intermediate, hidden] and "
            "[experts, hidden, intermediate]"
        )
    return ExpertsLayout(down.shape[0], hidden, inner, gate_up.dtype, transposed, bias, turns)


def give_routes(block: Any, fused: nn.Module, name: str) -> None:
    """Make a layer's MoE `block` call its experts, which were `fused`, with tokens and routes, as all others do.

    Llama 4's are given tokens times their router's score, and what they give is added as it is. With one expert for
    each token, as all published ones have it, that is a call with scaled tokens and weights of 1.
    """
    if type(fused).__name__ != LLAMA4:
        return
    if block.top_k != 1:
        raise CheckpointError(
            f"{name}: num_experts_per_tok is {block.top_k}; of this architecture quantkit runs models that route each "
            "token to one expert. Schemes that need no calibration data work without it"
        )
    block.forward = MethodType(_llama4, block)


def _llama4(block: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    hidden = hidden_states.reshape(-1, block.hidden_dim)
    scores, logits = block.router(hidden)
    chosen = torch.topk(logits, 1, dim=1).indices
    weights = scores.gather(1, chosen)
    out: Tensor = block.shared_expert(hidden)
    out.add_(block.experts(hidden * weights, chosen, torch.ones_like(weights)))
    return out, logits
