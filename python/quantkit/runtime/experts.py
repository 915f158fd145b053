"""Experts whose weights are codes: tokens are sorted by expert, and each projection of all experts is one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..formats.source import WeightSource
from ..models.experts import Expert, Experts
from ..targets import served
from .linear import (
    FP8Linear,
    Int4Int8Linear,
    Int8Linear,
    IntLinear,
    PackedLinear,
    Parts,
    kind_of,
    quant_linear,
    refuse_device,
    stacked,
)

# What the ops over experts take from a Linear of each kind: tensors, one for each expert, and numbers.
_KINDS: dict[type[PackedLinear], tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    Int8Linear: ("w8a8", ("input_scale", "input_zero_point"), ()),
    Int4Int8Linear: ("w4a8", ("weight_zero_point",), ("group_size",)),
    IntLinear: ("wna16", ("weight_zero_point", "perm"), ("num_bits", "group_size")),
    FP8Linear: ("fp8", ("input_scale",), ("weight_block", "input_block")),
}
_NUMBERS = ("input_scale", "input_zero_point")


class ExpertLinears(nn.Module):
    """One projection of all experts. Buffers are those of the kind's QuantLinear, stacked."""

    packed: Tensor
    weight_scale: Tensor

    def __init__(self, linears: Iterator[PackedLinear], count: int) -> None:
        """`linears` gives one for each of `count` experts; each is let go of before the next is made."""
        super().__init__()
        self.kind = ""
        self.tensors: tuple[str, ...] = ()
        for index, linear in enumerate(linears):
            if index == 0:
                self.in_features, self.out_features = linear.in_features, linear.out_features
                self.args, self.inputs = linear.args, linear.inputs
                self.kind, tensors, names = _KINDS[type(linear)]
                self.tensors = tuple(t for t in tensors if getattr(linear, t) is not None)
                self.how = {name: getattr(linear, name) for name in names}
                if self.kind == "w8a8":
                    assert linear.inputs is not None
                    self.how["symmetric"] = linear.inputs.symmetric
                for name in ("packed", "weight_scale", *self.tensors):
                    one = getattr(linear, name)
                    shape = (count,) if name in _NUMBERS else (count, *one.shape)
                    self.register_buffer(name, one.new_empty(shape), persistent=False)
            for name in ("packed", "weight_scale", *self.tensors):
                one = getattr(linear, name)
                getattr(self, name)[index] = one.reshape(()) if name in _NUMBERS else one

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x [rows, in_features], sorted by expert, offsets [experts + 1] -> [rows, out_features]."""
        stacks = {name: getattr(self, name) for name in self.tensors}
        return ops.moe_gemm(
            self.kind, x, offsets, self.packed, self.weight_scale, self.out_features, **stacks, **self.how
        )

    def _apply(self, fn: Any, recurse: bool = True) -> ExpertLinears:
        refuse_device(fn)
        return self


class QuantExperts(nn.Module):
    """Stands in for a layer's experts: same call, gate and up of all experts in one product, down in another."""

    def __init__(self, experts: Experts, gate_up: ExpertLinears, down: ExpertLinears) -> None:
        super().__init__()
        self.num_experts = len(experts)
        self.gate_up, self.down = gate_up, down
        self.combine = experts.combine
        self.stored: Callable[[], dict[str, Tensor]] | None = None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, hidden], top_k_index and top_k_weights [tokens, k] -> [tokens, hidden]."""
        order, offsets = ops.sort_by_expert(top_k_index, self.num_experts)
        each = top_k_index.shape[1]
        gate, up = self.gate_up(hidden_states[order // each], offsets).chunk(2, -1)
        y = self.down(self.combine(gate, up).contiguous(), offsets)
        return ops.combine_experts(y, order, each, top_k_weights)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """What the checkpoint holds: each expert's tensors."""
        assert self.stored is not None
        for name, tensor in self.stored().items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(
            f"load_state_dict: {prefix[:-1]} is packed for its kernel when it is made and takes no other weights; "
            "load a checkpoint with quantkit.load"
        )


def quant_experts(experts: Experts, parts: Callable[[int, str], Parts], release: Callable[[int], None]) -> QuantExperts:
    """The QuantExperts for `experts`, made from `parts(expert, name)`, which `suits` says yes to. `release(expert)` is
    called when that expert was read.
    """
    expert = experts[0]
    assert isinstance(expert, Expert)
    gate, up, down = expert.parts

    def merged(index: int) -> PackedLinear:
        both = stacked([parts(index, gate), parts(index, up)])
        assert both is not None
        return quant_linear(both)

    def second(index: int) -> PackedLinear:
        linear = quant_linear(parts(index, down))
        release(index)
        return linear

    count = len(experts)
    return QuantExperts(
        experts, ExpertLinears(map(merged, range(count)), count), ExpertLinears(map(second, range(count)), count)
    )


def suits(source: WeightSource, names: list[list[str]]) -> bool:
    """Whether the experts whose gate, up and down projections are called `names` can be one QuantExperts: all of them
    quantized, and in one way. Else each runs on its own.
    """
    if any(name not in source.schemes for row in names for name in row):
        return False
    tensors, tensor = source.checkpoint.tensors, source.checkpoint.tensor
    first = [served(source.schemes[name]) for name in names[0]]
    if first[0] != first[1] or any([served(source.schemes[name]) for name in row] != first for row in names):
        return False
    for scheme in first:
        kind = kind_of(scheme)
        # Activations that no integer kernel takes would be rounded for all experts together; orders differ by expert.
        if kind not in _KINDS or (kind is IntLinear and scheme.input_activations is not None):
            return False
        if scheme.weights.actorder == "group":
            return False
    if first[0].weights.strategy == "block" and source.shape(names[0][0])[0] % first[0].weights.block[0]:
        return False
    if any(f"{name}.bias" in tensors for row in names for name in row):
        return False
    if len({source.scale_dtype(name) for row in names for name in row}) > 1:
        return False
    for gate, up, _ in names:
        for part in ("input_scale", "input_zero_point"):
            here, there = f"{gate}.{part}", f"{up}.{part}"
            if here in tensors and not torch.equal(tensor(here), tensor(there)):
                return False
    return True
