"""The attention modules of a checkpoint, by its names and config.json, and what a recipe asks of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .config.attention import ANY, AttentionGroup
from .errors import PlanError
from .formats.cache import CacheShape
from .formats.compressed_tensors import NAME
from .models.attention_class import attention_class
from .models.families import Family, text_config
from .targets import pattern_of

if TYPE_CHECKING:
    from .checkpoint.reader import Checkpoint
    from .config.recipe import Recipe
    from .config.run_config import RunConfig
    from .formats import Format

# The Linear that makes keys stands below the module that caches them.
KEYS = re.compile(r"\.(k_proj|qkv_proj|kv_b_proj|query_key_value)$")


def attention_modules(family: Family, names: Iterable[str]) -> tuple[str, ...]:
    """Of a checkpoint with these tensor names the modules that cache keys and values: those above what makes keys."""
    modules = (name.removesuffix(".weight") for name in names if family.layer_of(name) is not None)
    return tuple(dict.fromkeys(name[: match.start()] for name in modules if (match := KEYS.search(name))))


def kv_heads(config: Mapping[str, Any]) -> int | None:
    """How many heads keys and values have, None where config.json does not tell or they are not cached by head."""
    text = text_config(config)
    heads = text.get("num_key_value_heads") or text.get("num_attention_heads")
    return heads if isinstance(heads, int) and not text.get("kv_lora_rank") else None


def query_heads(config: Mapping[str, Any]) -> int | None:
    """How many heads queries have, None where config.json does not tell."""
    heads = text_config(config).get("num_attention_heads")
    return heads if isinstance(heads, int) else None


def cache_shape(checkpoint: Checkpoint, attention: str) -> CacheShape:
    """Of the keys and values that `attention` makes in a plain checkpoint."""
    made = [checkpoint.tensors.get(f"{attention}.{part}.weight") for part in ("k_proj", "v_proj")]
    keys, values = (0 if info is None else info.shape[0] for info in made)
    dtype = None if made[0] is None else made[0].dtype
    return CacheShape(kv_heads(checkpoint.config) or 1, keys, values, dtype)


def attentions_of(
    recipe: Recipe, family: Family, checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[str, ...]:
    """The modules that get KV-cache scales."""
    if recipe.kv_cache is None:
        return ()
    found = attention_modules(family, shapes)
    if not found:
        raise PlanError(
            f"kv_cache_scheme: no decoder layer of {checkpoint.folder} has a k_proj, qkv_proj or kv_b_proj, so it is "
            "not known which modules cache keys; leave kv_cache_scheme out"
        )
    if recipe.kv_cache.strategy == "attn_head" and kv_heads(checkpoint.config) is None:
        raise PlanError(
            "kv_cache_scheme: strategy attn_head needs num_key_value_heads in config.json and one cache entry a head, "
            f"which model_type '{family.model_type}' does not have; use strategy tensor"
        )
    return found


def require_place(recipe: Recipe, fmt: Format) -> None:
    """PlanError if the format does not hold what the recipe asks of attention."""
    if recipe.attention is not None and fmt.NAME != NAME:
        raise PlanError(
            f"save_name '{fmt.NAME}' has no place for scales of queries; use save_name '{NAME}', or "
            "kv_cache_scheme alone"
        )


def attention_group(
    config: RunConfig, family: Family, checkpoint: Checkpoint, attentions: Sequence[str]
) -> AttentionGroup | None:
    """The recipe's group for attention, with the class that this model's attention has as its target."""
    found = config.recipe.attention
    if found is None:
        return None
    if found.args.strategy == "attn_head" and query_heads(checkpoint.config) is None:
        raise PlanError(
            f"config_groups.{found.name}: strategy attn_head needs num_attention_heads in config.json; use tensor"
        )
    for pattern in (pattern for pattern in config.ignore if pattern.startswith("re:")):
        name = next((name for name in attentions if pattern_of("ignore", pattern).match(name)), None)
        if name is None:
            continue
        raise PlanError(
            f"ignore: '{pattern}' matches {name} itself, and config_groups.{found.name} quantizes attention in all "
            rf"layers; a pattern that goes on with \. takes its Linears alone (re:.*self_attn\..*)"
        )
    kind = attention_class(
        checkpoint.folder,
        family,
        attentions,
        trust_remote_code=config.model.trust_remote_code,
        model=getattr(checkpoint, "model", None),
    )
    other = [target for target in found.targets if target not in (ANY, kind)]
    if other:
        raise PlanError(
            f"config_groups.{found.name}.targets: '{other[0]}' is no class of this model, whose attention is {kind}; "
            f"write {kind}, or {ANY} for whatever a model has"
        )
    return replace(found, targets=(kind,))
