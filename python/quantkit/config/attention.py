"""A group for attention: queries, keys and values of one class of modules quantized alike, in llm-compressor's words.

{attention: {targets: [LlamaAttention], input_activations: {num_bits: 8, type: float, strategy: attn_head}}}
"""

from __future__ import annotations

from collections.abc import Mapping as MappingType
from dataclasses import asdict, dataclass, replace
from typing import Any

from .fields import FieldError, require
from .groups import args_of, check_keys, names
from .observers import INPUT_OBSERVERS, observer
from .schemes import QuantizationArgs

# The target that stands for whatever class a model's attention has.
ANY = "Attention"
KIND = "8 bit, symmetric, static, strategy tensor or attn_head"


@dataclass(frozen=True)
class AttentionGroup:
    """`name`: its key among config_groups. `targets`: classes of modules, as LlamaAttention, or `Attention`."""

    name: str
    targets: tuple[str, ...]
    args: QuantizationArgs

    @property
    def entry(self) -> dict[str, Any]:
        """As `config_groups` has it."""
        args = {key: value for key, value in asdict(self.args).items() if value is not None and value != {}}
        return {"targets": list(self.targets), "input_activations": args}


def for_attention(group: Any) -> bool:
    """Whether a value of `config_groups` is such a group: no weights, and classes of attention among its targets."""
    if isinstance(group, AttentionGroup):
        return True
    if not isinstance(group, MappingType) or group.get("weights") is not None:
        return False
    targets = group.get("targets")
    listed = [targets] if isinstance(targets, str) else targets
    return isinstance(listed, list | tuple) and any(str(target).endswith(ANY) for target in listed)


def attention_of(groups: MappingType[str, Any] | None) -> AttentionGroup | None:
    """The only one among `config_groups`; FieldError for two, and for what servers do not read."""
    found = [_group(key, group) for key, group in (groups or {}).items() if for_attention(group)]
    keys = " and ".join(group.name for group in found)
    require(len(found) < 2, "config_groups", f"{keys} are both for attention, which has one quantization; keep one")
    return found[0] if found else None


def _group(key: str, group: Any) -> AttentionGroup:
    at = f"config_groups.{key}"
    if isinstance(group, AttentionGroup):
        return group
    check_keys(at, group)
    targets = names(f"{at}.targets", group["targets"])
    other = [target for target in targets if target.startswith("re:") or not target.endswith(ANY)]
    if other:
        raise FieldError(
            f"{at}.targets",
            f"'{other[0]}' beside a class of attention: a group without weights quantizes queries, keys and values of "
            f"classes alone (LlamaAttention, Qwen3Attention, or {ANY} for whatever the model has); give Linears a "
            "group of their own, with weights",
        )
    inputs = group.get("input_activations")
    if inputs is None:
        raise FieldError(
            f"{at}.input_activations", f"is missing: it says how queries, keys and values are quantized, in {KIND}"
        )
    args = inputs if isinstance(inputs, QuantizationArgs) else args_of(f"{at}.input_activations", inputs)
    fits = args.num_bits == 8 and args.symmetric and not args.dynamic and args.strategy in ("tensor", "attn_head")
    require(
        fits,
        f"{at}.input_activations",
        f"{args.num_bits} bit, {'symmetric' if args.symmetric else 'asymmetric'}, "
        f"{'dynamic' if args.dynamic else 'static'}, strategy {args.strategy}: queries, keys and values have scales in "
        f"{KIND}",
    )
    check_observer(f"{at}.input_activations.observer", observer(f"{at}.observer", args.observer, INPUT_OBSERVERS))
    return AttentionGroup(key, targets, replace(args, observer=None, observer_kwargs={}))


def check_observer(key: str, name: str | None) -> None:
    """FieldError for an observer that looks at more than the range."""
    require(
        name in (None, "minmax"),
        key,
        f"'{name}': scales of queries, keys and values are found by minmax; leave it out",
    )


def cache_args(cache: QuantizationArgs | None, attention: AttentionGroup | None) -> QuantizationArgs | None:
    """How keys and values are cached, where a group for attention says it, too; FieldError if they differ."""
    if attention is None:
        return cache
    require(
        cache is None or replace(cache, observer=None, observer_kwargs={}) == attention.args,
        "kv_cache_scheme",
        f"is another quantization than config_groups.{attention.name}, which keys and values have with the queries; "
        "leave it out",
    )
    return attention.args
