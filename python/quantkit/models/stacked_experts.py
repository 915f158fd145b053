"""Experts that a checkpoint stores as one tensor for all of a layer: which part of it is one expert's Linear.

Such a layer has `<experts>.gate_up_proj` [experts, ...] and `<experts>.down_proj` [experts, ...] instead of
`<experts>.3.gate_proj.weight` [out, in] and so on, the names that quantized checkpoints and servers have. Matrices are
[out, in], or [in, out] where the model multiplies by them as they are; shapes tell which. What shapes do not tell is
in a table: whether gate and up are halves, gate first, or take turns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .families import Family

GATE_UP, DOWN, BIAS = "gate_up_proj", "down_proj", "_bias"


@dataclass(frozen=True)
class Stacking:
    """How a family stacks. `turns`: gate's and up's rows alternate, instead of one half each. `apart`: in a checkpoint
    of which anything is quantized, Transformers reads each expert by itself, also those that are not quantized.
    """

    turns: bool = False
    apart: bool = False


# model_type -> how its checkpoints stack, of those that do.
STACKINGS: dict[str, Stacking] = {
    "qwen3_vl_moe_text": Stacking(),
    "qwen3_5_moe_text": Stacking(),
    "qwen3_next": Stacking(),
    "llama4_text": Stacking(apart=True),
    "gpt_oss": Stacking(turns=True),
}


# model_type -> clients (vLLM 0.32, SGLang 0.5.23, Transformers 5.22) that leave its experts out once these are
# quantized, and compute with numbers that nobody wrote: they have room for the published layout alone.
UNREAD: dict[str, tuple[str, ...]] = {
    "gpt_oss": ("vllm", "sglang", "transformers"),
    "qwen3_vl_moe_text": ("transformers",),
}


@dataclass(frozen=True)
class Part:
    """What one expert has of a stacked tensor: of matrix (or bias) `index` the `rows`, which are columns if
    `transposed`. `shape` is the part's own, [out, in] or [out].
    """

    stacked: str
    index: int
    rows: slice
    transposed: bool
    shape: tuple[int, ...]

    @property
    def run(self) -> bool:
        """Whether it lies in the file as one run of bytes."""
        return not self.transposed and self.rows.step is None


def parts_of(family: Family, tensors: Mapping[str, Sequence[int]]) -> dict[str, dict[str, Part]]:
    """For every stacked tensor among `tensors` (name -> shape) that can be taken apart, its parts by the names that
    they have in checkpoints which store each by itself; of one layer all or none. The order is that of the experts.
    """
    stacking = STACKINGS.get(family.model_type)
    found: dict[str, dict[str, Part]] = {}
    for name in tensors if stacking is not None else ():
        experts = name.removesuffix(f".{DOWN}")
        if experts == name or not experts.endswith(".experts") or family.layer_of(name) is None:
            continue
        assert stacking is not None
        found.update(_of_layer(family, experts, tensors, stacking) or {})
    return {name: found[name] for name in tensors if name in found}


def _of_layer(
    family: Family, experts: str, tensors: Mapping[str, Sequence[int]], stacking: Stacking
) -> dict[str, dict[str, Part]] | None:
    names = [f"{experts}.{part}{end}" for part in (GATE_UP, DOWN) for end in ("", BIAS)]
    gate_up, down = tensors.get(names[0], ()), tensors[names[2]]
    if len(gate_up) != 3 or len(down) != 3 or gate_up[0] != down[0] or gate_up[0] == 0:
        return None
    count, transposed = down[0], False
    if (gate_up[1], gate_up[2]) != (2 * down[2], down[1]):
        transposed = True
        if (gate_up[2], gate_up[1]) != (2 * down[1], down[2]):
            return None
    hidden, inner = (down[2], down[1]) if transposed else (down[1], down[2])
    biases = [names[1] in tensors, names[3] in tensors]
    if any(biases) and [tensors.get(names[1]), tensors.get(names[3])] != [(count, 2 * inner), (count, hidden)]:
        return None
    gate, up = (
        (slice(0, inner), slice(inner, 2 * inner)) if not stacking.turns else (slice(0, None, 2), slice(1, None, 2))
    )
    first, second, last = family.expert_parts
    places = {0: ((first, gate), (second, up)), 2: ((last, slice(0, hidden)),)}
    result: dict[str, dict[str, Part]] = {}
    for which, members in places.items():
        rows, cols = (inner, hidden) if which == 0 else (hidden, inner)
        for kind, shape in (("weight", (rows, cols)), ("bias", (rows,))):
            name = names[which + (kind == "bias")]
            if name not in tensors:
                continue
            turned = transposed and kind == "weight"
            result[name] = {
                f"{experts}.{index}.{part}.{kind}": Part(name, index, where, turned, shape)
                for index in range(count)
                for part, where in members
            }
    return result
