"""Groups: which Linears get which scheme, in the words of llm-compressor and compressed-tensors, and back."""

from __future__ import annotations

from collections.abc import Mapping as MappingType
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from ..errors import ConfigError, nearest
from .fields import FieldError, require
from .schemes import ACTORDER_ALIASES, SCALE_DTYPES, QuantizationArgs, QuantizationScheme


@dataclass(frozen=True)
class SchemeGroup:
    """A scheme and the Linears it is for: `Linear` (all), full names, or `re:` patterns."""

    targets: tuple[str, ...]
    scheme: QuantizationScheme


def names(key: str, value: object) -> tuple[str, ...]:
    """A string or a list of strings as a tuple."""
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, Sequence) or not all(isinstance(item, str) for item in items):
        raise FieldError(key, f"expected a string or a list of strings, got {value!r}")
    for item in items:
        require(bool(item.strip()), key, "has an empty string; give a module name, or re: and a pattern")
    return tuple(items)


def kv_cache_args(value: object) -> QuantizationArgs | None:
    """`kv_cache_scheme` as QuantizationArgs: 8 bit, static, symmetric, per tensor, per head, or in int8 per channel."""
    if value is None or isinstance(value, QuantizationArgs):
        args = value
    elif isinstance(value, str):
        require(value.lower() in ("fp8", "int8"), "kv_cache_scheme", f"'{value}'; use fp8, int8, or its fields")
        args = QuantizationArgs(8, "float" if value.lower() == "fp8" else "int", strategy="tensor")
    elif isinstance(value, MappingType):
        args = args_of("kv_cache_scheme", value)
    else:
        raise FieldError("kv_cache_scheme", f"expected fp8, int8 or the fields of QuantizationArgs, got {value!r}")
    if args is not None:
        strategies = ("tensor", "attn_head") if args.type == "float" else ("tensor", "attn_head", "channel")
        fits = args.num_bits == 8 and args.symmetric and not args.dynamic and args.strategy in strategies
        known = "servers hold the cache in 8 bit, symmetric, static, per tensor or attn_head; NPUs in int8 per channel"
        require(fits, "kv_cache_scheme", known)
    return args


def args_of(key: str, value: MappingType[str, Any]) -> QuantizationArgs:
    """QuantizationArgs from a mapping in compressed-tensors' words; FieldError for a key that it does not have."""
    known = {f.name for f in fields(QuantizationArgs)}
    for name in value:
        accepted = name in known or name in ("scale_dtype", "zp_dtype")
        require(accepted, f"{key}.{name}", f"unknown{nearest(name, known)}; QuantizationArgs has {', '.join(known)}")
    given = {k: v for k, v in value.items() if k in known and v is not None}
    wanted = value.get("scale_dtype")
    if isinstance(given.get("block_structure"), list):
        given["block_structure"] = tuple(given["block_structure"])
    if "actorder" in given:
        given["actorder"] = ACTORDER_ALIASES.get(given["actorder"], given["actorder"])
    if "strategy" not in given:  # compressed-tensors' rule
        size = given.get("group_size")
        given["strategy"] = "tensor" if size is None else ("group" if size > 0 else "channel")
    if given.get("group_size") == -1:
        given.pop("group_size")
    try:
        args = QuantizationArgs(**given)
    except (ConfigError, TypeError) as error:
        raise FieldError(key, str(error)) from None
    has = SCALE_DTYPES[args.scales]
    fits = wanted is None or has is None or str(wanted).rpartition(".")[2] == has.rpartition(".")[2]
    require(fits, f"{key}.scale_dtype", f"'{wanted}', and scales of this kind are {has}; leave it out")
    return args


def config_group(key: str, group: Any) -> SchemeGroup:
    at = f"config_groups.{key}"
    if isinstance(group, SchemeGroup):
        return group
    if not isinstance(group, MappingType):
        raise FieldError(at, f"expected targets, weights and input_activations, got {group!r}")
    check_keys(at, group)
    weights, inputs = group.get("weights"), group.get("input_activations")
    if weights is None:
        raise FieldError(f"{at}.weights", "is missing; only a group for classes of attention has none")
    targets = names(f"{at}.targets", group.get("targets", "Linear"))
    classes = [target for target in targets if target.endswith("Attention")]
    require(
        not classes,
        f"{at}.weights",
        f"do not go with {classes and classes[0]}: weights are those of Linears (target re:.*_proj$ or the like); a "
        "group for attention has input_activations alone",
    )
    weights = weights if isinstance(weights, QuantizationArgs) else args_of(f"{at}.weights", weights)
    if inputs is not None and not isinstance(inputs, QuantizationArgs):
        inputs = args_of(f"{at}.input_activations", inputs)
    return SchemeGroup(targets, QuantizationScheme(key, weights, inputs))


def check_keys(at: str, group: MappingType[str, Any]) -> None:
    """FieldError for what a group does not have."""
    known = ("targets", "weights", "input_activations", "output_activations", "format")
    for name in group:
        require(name in known, f"{at}.{name}", f"unknown{nearest(name, known)}; a group has {', '.join(known)}")
    require(group.get("output_activations") is None, f"{at}.output_activations", "is not supported; leave it out")


def group_entry(group: SchemeGroup) -> dict[str, Any]:
    def args(value: QuantizationArgs | None) -> dict[str, Any] | None:
        if value is None:
            return None
        found = {k: v for k, v in asdict(value).items() if v is not None and v != {}}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}

    scheme = group.scheme
    entry = {"targets": list(group.targets), "weights": args(scheme.weights)}
    if scheme.input_activations is not None:
        entry["input_activations"] = args(scheme.input_activations)
    return entry


def with_actorder(group: SchemeGroup, order: Literal["group"] | None) -> SchemeGroup:
    scheme = group.scheme
    return replace(group, scheme=replace(scheme, weights=replace(scheme.weights, actorder=order)))
