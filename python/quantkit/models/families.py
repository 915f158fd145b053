"""What an architecture looks like, as data: which checkpoint tensors are Linear weights, which of them read the same
input, what must never be quantized. One row per `model_type`, where it differs from the Llama-shaped default.

Works from config.json and tensor names and shapes alone, and imports neither torch nor Transformers, so that a plan
for a 70B checkpoint takes no longer than reading its headers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ..errors import CheckpointError

# Module names that stay in full precision: norms, embeddings, routers and gates over experts, convolutions.
NEVER = (
    r"norm\d*$",
    r"(^|[._])embed\w*$",
    r"(^|\.)(wte|wpe)$",
    r"(^|\.)(mlp|block_sparse_moe|feed_forward|moe)\.(gate|router)(\.|$)",
    r"(^|\.)router(\.|$)",
    r"(^|\.)shared_expert_gate$",
    r"(^|\.)conv1d$",
    r"\.indexer\.(wk|weights_proj)$",  # of sparse attention: servers build them as one, without a scheme
)


@dataclass(frozen=True)
class LinearWeight:
    """A tensor `<module>.weight` [rows, cols] = [out, in] that a Linear holds. `expert`: one of many, routed to."""

    module: str
    rows: int
    cols: int
    head: bool = False
    expert: bool = False


@dataclass(frozen=True)
class Family:
    """Names of one architecture. Paths are those of the checkpoint.

    `roots`: what may stand before `layers.`; several for multimodal models, whose text part moved over the years.
    `fused`: parts of a module that read one input and that servers fuse, so their input scale has to be the same.
    `expert_parts`: gate, up and down projection of one expert. `renames`: (in the Transformers model, in the
    checkpoint), for the few whose names differ. `attention`: what Transformers has to use. `depth`: the key of
    config.json that says how many layers there are.
    """

    model_type: str
    known: bool = True
    num_layers: int = 0
    head_dim: int = 0
    tied: bool = False
    roots: tuple[str, ...] = ("model.",)
    layers: str = "layers"
    embedding: str = "embed_tokens"
    heads: tuple[str, ...] = ("lm_head",)
    never: tuple[str, ...] = NEVER
    fused: tuple[tuple[str, ...], ...] = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
    expert_parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    renames: tuple[tuple[str, str], ...] = ()
    attention: str = "sdpa"
    depth: str = "num_hidden_layers"

    @cached_property
    def _layer_tensor(self) -> re.Pattern[str]:
        roots = "|".join(re.escape(root) for root in self.roots)
        return re.compile(rf"^(?:{roots}){re.escape(self.layers)}\.(\d+)\.(.+)$")

    @cached_property
    def _never(self) -> re.Pattern[str]:
        return re.compile("|".join(f"(?:{pattern})" for pattern in self.never))

    def layer_of(self, name: str) -> int | None:
        """The decoder layer that tensor or module `name` belongs to; None outside layers and for layers that the
        model's own config does not count (multi-token-prediction heads are stored behind the last one).
        """
        match = self._layer_tensor.match(name)
        if match is None or int(match[1]) >= self.num_layers:
            return None
        return int(match[1])

    def is_head(self, module: str) -> bool:
        """Whether `module` turns hidden states into logits."""
        return module in self.heads

    def is_expert(self, module: str) -> bool:
        """Whether `module` is a projection of one routed expert."""
        return re.search(r"\.experts\.\d+\.\w+$", module) is not None

    def is_linear(self, name: str, shape: Sequence[int]) -> bool:
        """Whether checkpoint tensor `name` is the weight of a Linear that may be quantized, the head included."""
        module = name.removesuffix(".weight")
        if module == name or len(shape) != 2:
            return False
        return self.is_head(module) or (self.layer_of(name) is not None and self._never.search(module) is None)

    def linear_weights(self, tensors: Mapping[str, Sequence[int]]) -> list[LinearWeight]:
        """The Linears of a checkpoint, in the order of `tensors` (name -> shape)."""
        found = []
        for name, shape in tensors.items():
            if self.is_linear(name, shape):
                module = name.removesuffix(".weight")
                found.append(LinearWeight(module, shape[0], shape[1], self.is_head(module), self.is_expert(module)))
        return found

    def fused_experts(self, tensors: Mapping[str, Sequence[int]]) -> list[str]:
        """Names of expert weights stored as one 3-D tensor for all experts: no Linear, so they cannot be quantized."""
        return [
            name
            for name, shape in tensors.items()
            if len(shape) == 3 and ".experts." in name and self.layer_of(name) is not None
        ]

    def fused_sets(self, modules: Iterable[str]) -> list[tuple[str, ...]]:
        """The sets of at least two of `modules` that read one input and are fused by servers."""
        present = dict.fromkeys(modules)
        parents = dict.fromkeys(module.rpartition(".")[0] for module in present)
        sets: list[tuple[str, ...]] = []
        for parent in parents:
            for parts in self.fused:
                members = tuple(f"{parent}.{part}" for part in parts if f"{parent}.{part}" in present)
                if len(members) > 1:
                    sets.append(members)
        return sets

    def elsewhere(self, modules: Iterable[str]) -> list[str]:
        """Other names and patterns (`re:`) by which clients of compressed-tensors find `modules`: Transformers' own
        where they differ, and any for multimodal models, whose parts have moved: what a checkpoint calls
        `vision_tower.` is `model.vision_tower.` in Transformers.
        """
        patterns: dict[str, None] = {}
        for module in modules:
            name = f"{module}."
            for here, there in reversed(self.renames):
                name = name.replace(there, here)
            if name[:-1] != module:
                patterns[name[:-1]] = None
            if len(self.roots) == 1:
                continue
            layer = self._layer_tensor.match(module)
            inner = module.removeprefix("model.")
            if layer is not None:
                rest = re.escape(f".{self.layers}.{layer[1]}.{layer[2]}")
                patterns[f"re:.*{rest}$"] = None
            elif not self.is_head(module) and "." in inner:
                patterns[rf"re:(.*\.)?{re.escape(inner.split('.')[0])}\..*"] = None
        return list(patterns)

    def root(self, names: Iterable[str]) -> str:
        """The one of `roots` that a checkpoint with these tensor names uses."""
        present = {root for name in names for root in self.roots if name.startswith(f"{root}{self.layers}.")}
        for root in self.roots:
            if root in present:
                return root
        expected = " or ".join(f"{root}{self.layers}.0.*" for root in self.roots)
        raise CheckpointError(
            f"model_type '{self.model_type}': the checkpoint has no tensor named {expected}; "
            "it does not match its config.json, or the architecture is not a decoder that quantkit knows"
        )


_MULTIMODAL = ("language_model.model.", "model.language_model.", "model.")
_MLA = (
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("q_proj", "kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"),
)
_QWEN3_5 = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
# Layers of before Llama's.
_H: dict[str, Any] = {"roots": ("transformer.", ""), "layers": "h", "fused": ()}
_MIXTRAL = {"expert_parts": ("w1", "w3", "w2"), "fused": (("q_proj", "k_proj", "v_proj"), ("w1", "w3"))}

# model_type -> what differs from the default. `tied` here is what Transformers assumes where config.json is silent.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "ministral": {},
    "qwen2": {},
    "qwen3": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "qwen3_next": {"fused": (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("in_proj_qkvz", "in_proj_ba"))},
    **{f"qwen{n}_vl{text}": {} for n in ("2", "2_5") for text in ("", "_text")},
    "qwen3_vl_text": {},
    "qwen3_vl_moe_text": {},
    "llama4_text": {},
    "gpt_oss": {},
    "qwen3_5_text": {"fused": _QWEN3_5},
    "qwen3_5_moe_text": {"fused": _QWEN3_5},
    "mixtral": {**_MIXTRAL, "renames": ((".mlp.", ".block_sparse_moe."),)},
    "minimax_m2": {**_MIXTRAL, "renames": ((".mlp.", ".block_sparse_moe."),)},
    "phimoe": {**_MIXTRAL, "renames": ((".mlp.router.", ".mlp.gate."), (".mlp.", ".block_sparse_moe."))},
    "deepseek_v2": {"fused": _MLA},
    "deepseek_v3": {"fused": _MLA},
    "deepseek_v32": {"fused": _MLA},
    "glm4_moe_lite": {"fused": _MLA},
    "glm_moe_dsa": {"fused": _MLA},
    "gemma": {"tied": True},
    # Gemma 2 caps attention logits, which scaled_dot_product_attention cannot.
    "gemma2": {"attention": "eager", "tied": True},
    "gemma3_text": {"tied": True},
    "phi3": {"fused": ()},
    "glm": {"fused": (("q_proj", "k_proj", "v_proj"),)},
    "glm4": {"fused": (("q_proj", "k_proj", "v_proj"),)},
    "glm4v_text": {"fused": (("q_proj", "k_proj", "v_proj"),)},
    "glm4_moe": {},
    "granite": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "olmoe": {},
    "seed_oss": {},
    "smollm3": {"tied": True},
    "exaone4": {},
    "cohere": {"tied": True},
    "cohere2": {"tied": True},
    "starcoder2": {"fused": (("q_proj", "k_proj", "v_proj"),), "tied": True},
    "stablelm": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {},
    "ernie4_5": {"tied": True},
    "ernie4_5_moe": {"tied": True, "renames": ((".mlp.gate.moe_statics.", ".mlp.moe_statics."),)},
    "mimo_v2_flash": {"renames": ((".self_attn.sinks", ".self_attn.attention_sink_bias"),)},
    "exaone_moe": {"renames": ((".mlp.gate.e_score_correction_bias", ".mlp.e_score_correction_bias"),)},
    "hy_v3": {
        "renames": (
            (".mlp.gate.", ".mlp.router.gate."),
            (".mlp.e_score_correction_bias", ".mlp.expert_bias"),
            (".mlp.shared_experts.", ".mlp.shared_mlp."),
        )
    },
    "phi": {"fused": (("q_proj", "k_proj", "v_proj"),)},
    "persimmon": {"fused": ()},
    "nemotron": {},
    "opt": {
        "layers": "decoder.layers",
        "embedding": "decoder.embed_tokens",
        "fused": (("q_proj", "k_proj", "v_proj"),),
        "tied": True,
    },
    "gpt_neox": {
        "roots": ("gpt_neox.",),
        "embedding": "embed_in",
        "heads": ("embed_out",),
        "fused": (),
        "renames": (("lm_head", "embed_out"),),
    },
    "falcon": {**_H, "embedding": "word_embeddings", "tied": True},
    "bloom": {**_H, "embedding": "word_embeddings", "tied": True, "depth": "n_layer"},
    "gptj": {**_H, "embedding": "wte", "depth": "n_layer", "fused": (("q_proj", "k_proj", "v_proj"),)},
    "mpt": {**_H, "layers": "blocks", "embedding": "wte", "tied": True, "depth": "n_layers"},
    "ministral3": {},
    "dots1": {},
    "solar_open": {},
}


# Names of config.json, of which older models have others.
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_WIDTH = ("hidden_size", "n_embd", "d_model")


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of config.json that describes the decoder: `text_config` (`llm_config`) of a multimodal model."""
    for key in ("text_config", "llm_config", "language_config"):
        nested = config.get(key)
        if isinstance(nested, Mapping) and "num_hidden_layers" in nested:
            return nested
    return config


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config.json (as a dict), with its number of layers and whether the head is tied."""
    text = text_config(config)
    model_type = str(text.get("model_type") or config.get("model_type") or "")
    row = FAMILIES.get(model_type, {})
    key = row.get("depth", Family.depth)
    layers = text.get(key)
    if not isinstance(layers, int) or isinstance(layers, bool) or layers < 1:
        raise CheckpointError(
            f"config.json (model_type '{model_type}'): {key} is {layers!r}; a decoder-only language model "
            "states how many layers it has"
        )
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", row.get("tied", False)))
    heads = next((text[key] for key in _HEADS if text.get(key)), 1)
    hidden = next((text[key] for key in _WIDTH if text.get(key)), 0)
    head_dim = text.get("head_dim") or hidden // heads
    family = replace(
        Family(model_type, **row),
        known=model_type in FAMILIES,
        num_layers=layers,
        head_dim=head_dim,
        tied=bool(tied),
    )
    if text is not config or "vision_config" in config:
        family = replace(family, roots=_MULTIMODAL, heads=("lm_head", "language_model.lm_head"))
    return family
