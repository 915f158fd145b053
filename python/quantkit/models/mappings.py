"""Where a model can be smoothed: pairs of a layer and those that read its output, per architecture family.

Dividing a channel of the first's output by s and multiplying the readers' weights by s changes nothing, if all readers
are there. The tables are data: names relative to a decoder layer, as patterns of their dotted parts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..config.recipe import AWQModifier, SmoothQuantModifier
from ..config.recipe import Mapping as Pattern
from ..errors import PlanError, nearest
from .families import Family

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
# The indexer of sparse attention reads both norms, too.
_MLA = (
    r"re:.*self_attn\.(q_proj|q_a_proj)$",
    "self_attn.kv_a_proj_with_mqa",
    r"re:.*\.indexer\.(wk|weights_proj)$",
)
_ATTENTION = Pattern("input_layernorm", _QKV)
_MLP = Pattern("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"))
_V_TO_O = Pattern("self_attn.v_proj", ("self_attn.o_proj",))
_UP_TO_DOWN = Pattern(r"re:.*\.(up_proj|w3)$", (r"re:.*\.(down_proj|w2)$",))
# Every reader of the norm, the router and shared experts among them; those that a model lacks match nothing.
_EXPERTS = Pattern(
    "post_attention_layernorm",
    (
        r"re:.*\.mlp\.(gate|gate\.wg|shared_expert_gate|router|router\.gate)$",
        r"re:.*\.block_sparse_moe\.gate$",
        r"re:.*\.(gate_proj|up_proj|w1|w3)$",
    ),
)
_LLAMA4 = Pattern(
    "post_attention_layernorm",
    (r"re:.*\.feed_forward\.router$", r"re:.*\.feed_forward\.(.*\.)?(gate_proj|up_proj)$"),
)
_MLA_INNER = (
    Pattern("self_attn.q_a_layernorm", ("self_attn.q_b_proj", "indexer.wq_b")),
    Pattern("self_attn.kv_a_layernorm", ("self_attn.kv_b_proj",)),
)
_PHI = (
    Pattern("input_layernorm", ("self_attn.qkv_proj",)),
    Pattern("post_attention_layernorm", ("mlp.gate_up_proj",)),
)
_GEMMA = Pattern("pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj"))
_PARALLEL = Pattern("input_layernorm", (*_QKV, "mlp.gate_proj", "mlp.up_proj"))

_PHI_2 = Pattern("input_layernorm", (*_QKV, "mlp.fc1"))
_FUSED_QKV = "self_attention.query_key_value"
_H_MLP = Pattern("post_attention_layernorm", ("mlp.dense_h_to_4h",))
_OPT = (Pattern("self_attn_layer_norm", _QKV), Pattern("final_layer_norm", ("fc1",)))
_NEOX = (Pattern("input_layernorm", ("attention.query_key_value",)), _H_MLP)
_BLOOM = (Pattern("input_layernorm", (_FUSED_QKV,)), _H_MLP)
_FALCON = (*_BLOOM, Pattern("ln_attn", (_FUSED_QKV,)), Pattern("ln_mlp", ("mlp.dense_h_to_4h",)))
_GPTJ = (Pattern("ln_1", ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in")),)
_MPT = (Pattern("norm_1", ("attn.Wqkv",)), Pattern("norm_2", ("ffn.up_proj",)))

_LINEAR_ATTENTION = Pattern("input_layernorm", (r"re:.*\.linear_attn\.in_proj_\w+$",))

_LLAMA = (_ATTENTION, _MLP)
# model_type -> (SmoothQuant's, AWQ's). Norms behind a Linear (Gemma 2, OLMo 2) feed the residual and are no place.
TABLES: dict[str, tuple[tuple[Pattern, ...], tuple[Pattern, ...]]] = {
    # One vector over all experts harms SmoothQuant, which looks at extremes; AWQ weighs what each expert sees.
    **dict.fromkeys(
        (
            *("qwen2_moe", "qwen3_moe", "mixtral", "glm4_moe", "olmoe", "minimax_m2", "phimoe", "hunyuan_v1_moe"),
            *("ernie4_5_moe", "mimo_v2_flash", "hy_v3", "dots1", "solar_open", "qwen3_vl_moe_text"),
        ),
        ((_ATTENTION,), (_ATTENTION, _V_TO_O, _EXPERTS, _UP_TO_DOWN)),
    ),
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"),
        ((Pattern("input_layernorm", _MLA),), (Pattern("input_layernorm", _MLA), *_MLA_INNER, _EXPERTS, _UP_TO_DOWN)),
    ),
    **dict.fromkeys(
        ("qwen3_next", "qwen3_5_text"),
        ((_ATTENTION, _LINEAR_ATTENTION, _MLP), (_ATTENTION, _LINEAR_ATTENTION, _V_TO_O, _MLP, _UP_TO_DOWN)),
    ),
    "qwen3_5_moe_text": (
        (_ATTENTION, _LINEAR_ATTENTION),
        (_ATTENTION, _LINEAR_ATTENTION, _V_TO_O, _EXPERTS, _UP_TO_DOWN),
    ),
    "llama4_text": ((_ATTENTION,), (_ATTENTION, _V_TO_O, _LLAMA4, _UP_TO_DOWN)),
    # What up gives is clamped, and one is added to it: no factor passes that.
    "gpt_oss": ((_ATTENTION,), (_ATTENTION, _V_TO_O, _EXPERTS)),
    "phi3": (_PHI, _PHI),
    **dict.fromkeys(("gemma2", "gemma3_text"), ((_ATTENTION, _GEMMA), (_ATTENTION, _V_TO_O, _GEMMA, _UP_TO_DOWN))),
    **dict.fromkeys(("cohere", "cohere2"), ((_PARALLEL,), (_PARALLEL, _V_TO_O, _UP_TO_DOWN))),
    **dict.fromkeys(("olmo2", "olmo3", "exaone4", "exaone_moe"), ((), (_V_TO_O, _UP_TO_DOWN))),
    "starcoder2": (
        (_ATTENTION, Pattern("post_attention_layernorm", ("mlp.c_fc",))),
        (_ATTENTION, _V_TO_O, Pattern("post_attention_layernorm", ("mlp.c_fc",))),
    ),
    "phi": ((_PHI_2,), (_PHI_2, Pattern("self_attn.v_proj", ("self_attn.dense",)))),
    "persimmon": ((Pattern("input_layernorm", ("self_attn.query_key_value",)), _H_MLP),) * 2,
    "opt": (_OPT, (*_OPT, Pattern("self_attn.v_proj", ("self_attn.out_proj",)))),
    "gpt_neox": (_NEOX, _NEOX),
    "bloom": (_BLOOM, _BLOOM),
    "falcon": (_FALCON, _FALCON),
    "gptj": (_GPTJ, (*_GPTJ, Pattern("attn.v_proj", ("attn.out_proj",)))),
    "mpt": (_MPT, _MPT),
    "glm4v_text": ((_ATTENTION, Pattern("post_attention_layernorm", ("mlp.gate_up_proj",))),) * 2,
    "glm4": ((_ATTENTION, Pattern("post_attention_layernorm", ("mlp.gate_up_proj",))),) * 2,
    "glm": ((_ATTENTION, Pattern("post_attention_layernorm", ("mlp.gate_up_proj",))),) * 2,
}
DEFAULT = (_LLAMA, (_ATTENTION, _V_TO_O, _MLP, _UP_TO_DOWN))
# For layers whose attention and MLP read one norm side by side, as some models of a type that has two do.
SIDE_BY_SIDE = {
    "stablelm": _PARALLEL,
    "falcon": Pattern("input_layernorm", (_FUSED_QKV, "mlp.dense_h_to_4h")),
}
_SECOND = re.compile(r"\.(post_attention_layernorm|ln_mlp)$")
# What the layers of an unknown architecture may hold, so that the default mappings are taken to fit.
_LLAMA_SHAPED = re.compile(
    r"(input_layernorm|post_attention_layernorm|self_attn\.[qkvo]_proj|self_attn\.[qk]_norm|mlp\.(gate|up|down)_proj"
    r"|(mlp|block_sparse_moe)\.(gate|router|shared_expert_gate|shared_experts?\.\w+|experts\.\d+\.\w+))$"
)

_EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class Smoothing:
    """One place in one decoder layer: module `smooth` (a norm, or a Linear by its rows) and every reader.

    With grouped-query attention each head of values (`head_dim` channels) is read by `repeat` heads side by side.
    """

    layer: int
    smooth: str
    balance: tuple[str, ...]
    kind: Literal["norm", "linear"]
    repeat: int = 1
    head_dim: int = 1

    @property
    def across_experts(self) -> bool:
        """Whether it takes an expert together with others, or with what is none."""
        numbers = (_EXPERT.search(f"{module}.") for module in (self.smooth, *self.balance))
        return len({None if found is None else found[1] for found in numbers}) > 1


def smoothings(
    modifier: SmoothQuantModifier | AWQModifier, family: Family, tensors: Mapping[str, Sequence[int]]
) -> tuple[tuple[Smoothing, ...], tuple[str, ...]]:
    """Every place that `modifier` smooths in a checkpoint with `tensors` (name -> shape), layer by layer in the order
    of its mappings, and notes on those passed over. PlanError for a pattern of the user's that matches nothing.
    """
    given = modifier.mappings
    table: Sequence[Pattern] = given or TABLES.get(family.model_type, DEFAULT)[isinstance(modifier, AWQModifier)]
    modules: dict[int, list[str]] = {}
    for name in tensors:
        layer = family.layer_of(name)
        if layer is not None and name.endswith(".weight"):
            modules.setdefault(layer, []).append(name.removesuffix(".weight"))
            inner = modules[layer][-1].partition(f".{family.layers}.{layer}.")[2]
            if not family.known and given is None and _LLAMA_SHAPED.match(inner) is None:
                raise PlanError(
                    f"{type(modifier).__name__}: model_type '{family.model_type}' is not in quantkit's table, and its "
                    f"layers have '{inner}', which Llama's have not: where it can be smoothed is not known; give "
                    "mappings=[[[balance layers], smooth layer], ...], which name every reader of what they smooth"
                )
    skip = {m for names in modules.values() for m in names if any(matches(p, m) for p in modifier.ignore or ())}
    found: list[Smoothing] = []
    notes: dict[str, int] = {}
    for layer, members in sorted(modules.items()):
        for pattern in table if given else _of_layer(table, family, members):
            for place in _places(pattern, layer, members, tensors):
                if pattern is _UP_TO_DOWN and not _gated(place.smooth, members):
                    continue
                if place.smooth in skip or any(b in skip for b in place.balance):
                    continue
                fitted = _fitted(place, family, tensors)
                if isinstance(fitted, Smoothing):
                    found.append(fitted)
                else:
                    notes[fitted] = notes.get(fitted, 0) + 1
    if given is not None:
        _require_matches(given, [m for members in modules.values() for m in members], found)
    if not found:
        raise PlanError(
            f"{type(modifier).__name__}: model_type '{family.model_type}' has no place to smooth"
            f"{'' if given else ' in the default mappings; give mappings=[[[balance layers], smooth layer], ...]'}"
        )
    return tuple(found), tuple(f"{reason} (x{count})" for reason, count in notes.items())


def _of_layer(table: Sequence[Pattern], family: Family, members: Sequence[str]) -> Sequence[Pattern]:
    """What of the default mappings fits the layer with these modules."""
    side_by_side = SIDE_BY_SIDE.get(family.model_type)
    if side_by_side is None or any(map(_SECOND.search, members)):
        return table
    return (side_by_side, *(pattern for pattern in table if pattern.smooth_layer != side_by_side.smooth_layer))


def matches(pattern: str, module: str) -> bool:
    """Whether `module` is what `pattern` means: `re:` from the start of the full name, else a run of dotted parts at
    its end.
    """
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return module == pattern or module.endswith(f".{pattern}")


def _places(
    pattern: Pattern, layer: int, members: Sequence[str], tensors: Mapping[str, Sequence[int]]
) -> Iterable[Smoothing]:
    """For each match of the smooth layer, the balance layers nearest to it: those that share most of its name."""
    candidates = [m for m in members if any(matches(p, m) for p in pattern.balance_layers)]
    for smooth in members:
        others = [m for m in candidates if m != smooth]
        if not matches(pattern.smooth_layer, smooth) or not others:
            continue
        norm = len(tensors[f"{smooth}.weight"]) == 1
        depth = max(_shared(smooth, m) for m in others)
        balance = tuple(m for m in others if _shared(smooth, m) >= (0 if norm else depth))
        yield Smoothing(layer, smooth, balance, "norm" if norm else "linear")


def _gated(up: str, members: Sequence[str]) -> bool:
    """Whether a gate multiplies what `up` gives. Without one an activation does, and no factor passes that."""
    parent, _, name = up.rpartition(".")
    return f"{parent}.{'w1' if name == 'w3' else 'gate_proj'}" in members


def _shared(a: str, b: str) -> int:
    count = 0
    for x, y in zip(a.split("."), b.split("."), strict=False):
        if x != y:
            break
        count += 1
    return count


def _fitted(place: Smoothing, family: Family, tensors: Mapping[str, Sequence[int]]) -> Smoothing | str:
    """The place with how its widths go together, or why they do not."""
    width = tensors[f"{place.smooth}.weight"][0]
    repeat = 1
    for module in place.balance:
        shape = tensors[f"{module}.weight"]
        inputs = shape[1] if len(shape) == 2 else 0
        heads = inputs % width == 0 and family.head_dim > 0 and width % family.head_dim == 0
        if inputs == width:
            continue
        if place.smooth.endswith("v_proj") and heads and len(place.balance) == 1 and inputs:
            repeat = inputs // width
            continue
        tail = ".".join(place.smooth.split(".")[-2:])
        return f"{tail}: {width} channels feed {module.rpartition('.')[2]} of {shape[-1]} inputs, so it is left out"
    return replace(place, repeat=repeat, head_dim=family.head_dim) if repeat > 1 else place


def _require_matches(given: Iterable[Pattern], modules: Sequence[str], found: Sequence[Smoothing]) -> None:
    tails = sorted({part for m in modules for part in (m.rpartition(".")[2], ".".join(m.split(".")[-2:]))})
    for pattern in given:
        for part in (pattern.smooth_layer, *pattern.balance_layers):
            if not any(matches(part, module) for module in modules):
                raise PlanError(
                    f"mappings: '{part}' matches no module of any decoder layer{nearest(part, tails)}; write a full "
                    "name, its last parts, or re: and a pattern"
                )
        used = any(
            matches(pattern.smooth_layer, p.smooth)
            and any(matches(b, m) for b in pattern.balance_layers for m in p.balance)
            for p in found
        )
        if not used:
            raise PlanError(
                f"mappings: '{pattern.smooth_layer}' and {', '.join(pattern.balance_layers)} match modules, but in no "
                "layer do their widths fit together (or ignore takes them out)"
            )
