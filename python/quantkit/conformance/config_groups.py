"""compressed-tensors' block in config.json: its config groups as the readers parse them, and vLLM's scheme of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..formats.compressed_tensors import of_attention
from .verdict import Verdict

Args = Mapping[str, Any]
KEYS = frozenset(
    [
        *("num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder"),
        *("scale_dtype", "zp_dtype", "observer", "observer_kwargs"),
    ]
)
STRATEGIES = ("tensor", "channel", "group", "block", "token", "tensor_group", "attn_head")
ACTIVATION_FORMATS = ("naive-quantized", "int-quantized", "float-quantized", "nvfp4-pack-quantized")
MIXED = "mixed-precision"


@dataclass(frozen=True)
class Group:
    key: str
    format: str
    weights: Args
    inputs: Args | None
    outputs: Args | None
    targets: tuple[str, ...]


def groups_of(block: Mapping[str, Any], verdict: Verdict) -> list[Group]:
    found = []
    entries = block.get("config_groups")
    if entries == {} and block.get("kv_cache_scheme"):
        return []
    if not isinstance(entries, Mapping) or not entries:
        verdict.add("refused", "config_groups", "is not there, so no Linear would be read as quantized")
        return []
    top = block.get("format")
    for key, entry in entries.items():
        where = f"config_groups.{key}"
        if of_attention(entry):
            _attention(where, entry, block, verdict)
            continue
        if not isinstance(entry, Mapping) or not isinstance(entry.get("weights"), Mapping):
            verdict.add("refused", where, "has no weights")
            continue
        if not isinstance(entry.get("targets"), list):
            verdict.add("refused", f"{where}.targets", "is not a list of names")
            continue
        other = [r for r in ("input_activations", "output_activations") if not isinstance(entry.get(r), Mapping | None)]
        if other:
            verdict.add("refused", f"{where}.{other[0]}", f"is {entry[other[0]]!r}; it has settings, or is null")
            continue
        own = entry.get("format")
        if own is None:
            verdict.add(
                "limited", f"{where}.format", "is not there; readers infer it in ways that changed between releases"
            )
        if own == MIXED or (own is None and top == MIXED):
            verdict.add("refused", f"{where}.format", f"is {MIXED}, which only the top level may be")
        for role in ("weights", "input_activations", "output_activations"):
            if isinstance(entry.get(role), Mapping):
                _args(f"{where}.{role}", entry[role], role, verdict)
        found.append(
            Group(
                str(key),
                str(own or top),
                entry["weights"],
                entry.get("input_activations"),
                entry.get("output_activations"),
                tuple(map(str, entry["targets"])),
            )
        )
    return found


def _args(where: str, args: Args, role: str, verdict: Verdict) -> None:
    """What compressed-tensors' own validators say no to."""
    unknown = sorted(set(args) - KEYS)
    if unknown:
        verdict.add(
            "refused", f"{where}.{unknown[0]}", "is a key that the readers' strict parser does not know", "drop it"
        )
    micro = args.get("type") == "float" and args.get("group_size") in (16, 32)
    for key in ("scale_dtype", "zp_dtype"):
        if args.get(key) is not None and not (micro and key == "scale_dtype"):
            verdict.add(
                "limited", f"{where}.{key}", "is a key that releases before compressed-tensors 0.13 refuse", "drop it"
            )
    bits = args.get("num_bits", 8)
    if not isinstance(bits, int):
        verdict.add("refused", f"{where}.num_bits", f"is {bits!r}, and not a number")
        return
    strategy, size, dynamic = strategy_of(args), args.get("group_size"), args.get("dynamic")
    if strategy not in STRATEGIES:
        verdict.add("refused", f"{where}.strategy", f"is '{strategy}'; there are {', '.join(STRATEGIES)}")
        return
    grouped = strategy in ("group", "tensor_group")
    if grouped and not (isinstance(size, int) and size > 0):
        verdict.add("refused", f"{where}.group_size", f"is {size}, and strategy {strategy} needs a positive one")
    if not grouped and isinstance(size, int) and size > 0:
        verdict.add("refused", f"{where}.group_size", f"is {size}, which does not go with strategy {strategy}")
    if (strategy == "block") != bool(args.get("block_structure")):
        verdict.add("refused", f"{where}.block_structure", f"does not go with strategy {strategy}")
    if strategy == "token" and not dynamic:
        verdict.add("refused", f"{where}.dynamic", "is false, and strategy token is always dynamic")
    if args.get("actorder") in ("group", "dynamic") and not grouped:
        verdict.add("refused", f"{where}.actorder", f"is '{args['actorder']}', which needs groups")
    if role != "weights" and (strategy in ("channel", "block") or args.get("actorder")):
        verdict.add("refused", f"{where}.strategy", f"is {strategy}, which activations cannot have")
    if dynamic == "local" and strategy != "tensor_group":
        verdict.add("refused", f"{where}.dynamic", f"is 'local', which goes with tensor_group, not with {strategy}")
    _scale_dtype(where, args, strategy, verdict)
    if role == "weights" and dynamic:
        verdict.add("refused", f"{where}.dynamic", "is true, and weights are quantized once")


def _scale_dtype(where: str, args: Args, strategy: str, verdict: Verdict) -> None:
    """MX and NVFP4 are told by it, to some readers."""
    size, bits = args.get("group_size"), args.get("num_bits", 8)
    if args.get("type") != "float" or (strategy, size) not in (("group", 32), ("tensor_group", 16)):
        return
    wanted, told = "torch.uint8" if size == 32 else "torch.float8_e4m3fn", args.get("scale_dtype")
    if told == wanted:
        return
    if told is not None or bits == 8:
        verdict.add("refused", f"{where}.scale_dtype", f"is {told!r}; FP{bits} in groups of {size} needs '{wanted}'")
    elif verdict.client == "transformers" and args.get("dynamic"):
        verdict.add(
            "wrong", f"{where}.scale_dtype", f"is not there, so activations get scales of another kind than '{wanted}'"
        )


def check_block(block: Mapping[str, Any], groups: list[Group], verdict: Verdict) -> None:
    status = block.get("quantization_status")
    if status != "compressed":
        verdict.add(
            "wrong" if verdict.client == "transformers" else "limited",
            "quantization_status",
            f"is {status!r}; a saved checkpoint is 'compressed', and Transformers takes others for one that is not",
            "set it to 'compressed'",
        )
    if block.get("sparsity_config"):
        verdict.add(
            "refused", "sparsity_config", "is not empty; servers no longer read sparse checkpoints", "set it to {}"
        )
    formats = {group.format for group in groups}
    if block.get("format") is None:
        verdict.add("refused", "format", "is not there")
    elif len(formats) > 1 and block["format"] != MIXED:
        verdict.add("refused", "format", f"is '{block['format']}', and the groups have {', '.join(sorted(formats))}")
    if verdict.client == "transformers" and "lm_head" not in (block.get("ignore") or []):
        plain = any("Linear" in group.targets for group in groups)
        if plain:
            verdict.add(
                "wrong",
                "ignore",
                "does not name lm_head, which target Linear takes in Transformers",
                "add lm_head to ignore",
            )


def _attention(where: str, entry: Mapping[str, Any], block: Mapping[str, Any], verdict: Verdict) -> None:
    """A group for queries, keys and values, whose scales are the attention modules' own."""
    args, cache = entry["input_activations"], block.get("kv_cache_scheme")
    _args(f"{where}.input_activations", args, "input_activations", verdict)
    if verdict.client == "sglang":
        verdict.add(
            "refused", where, "has no weights, which SGLang (0.5.23) reads of every group", "serve it with vLLM"
        )
    if verdict.client == "vllm":
        if len(entry["targets"]) != 1:
            verdict.add("refused", f"{where}.targets", "are several; vLLM leaves a group out that has one class alone")
        if not isinstance(cache, Mapping):
            verdict.add("wrong", where, "quantizes the cache, which vLLM reads from kv_cache_scheme alone")
        else:
            verdict.add(
                "limited", where, "is left out by vLLM, which has queries in FP8 only where its attention takes them so"
            )
    keys = ("num_bits", "type", "strategy", "symmetric")
    if isinstance(cache, Mapping) and any(cache.get(key) != args.get(key) for key in keys):
        verdict.add("wrong", where, "is another quantization than kv_cache_scheme, and keys and values have one")


def strategy_of(args: Args) -> str:
    """As compressed-tensors infers it where it is not said."""
    if args.get("strategy") is not None:
        return str(args["strategy"])
    size = args.get("group_size")
    return "tensor" if size is None else ("channel" if size == -1 else "group")


def told(args: Args | None) -> str:
    if args is None:
        return "no quantized"
    size = f" {args['group_size']}" if args.get("group_size") else ""
    sign = "symmetric" if args.get("symmetric", True) else "asymmetric"
    when = ", dynamic" if args.get("dynamic") else ""
    return f"{args.get('type', 'int')}{args.get('num_bits', 8)} {strategy_of(args)}{size} {sign}{when}"


def scheme_of(group: Group) -> str | None:
    """vLLM's name for what a group is, None if it has no class for it. The first that fits is taken."""
    w, i, o = group.weights, group.inputs, group.outputs
    bits, kind, size = w.get("num_bits", 8), w.get("type", "int"), w.get("group_size")
    symmetric, strategy = bool(w.get("symmetric", True)), strategy_of(w)
    if (strategy, kind, bits, size, symmetric) == ("tensor_group", "float", 4, 16, True):
        alike = i is None or all(i.get(key) == w.get(key) for key in ("num_bits", "type", "strategy", "group_size"))
        return "NVFP4" if alike else None
    if (strategy, kind, size, symmetric) == ("group", "float", 32, True):
        if bits == 4:
            return "MXFP4"
        if bits == 8:
            return "MXFP8"
    grouped = strategy in ("channel", "group")
    packed = group.format == "pack-quantized"
    if i is not None and packed and kind == i.get("type", "int") == "int" and grouped and o is None:
        by_token = i.get("dynamic") is True and strategy_of(i) in ("token", "group") and i.get("symmetric", True)
        return "WNA8Int" if by_token and i.get("num_bits") == 8 else None
    if i is not None and packed and (kind, bits, strategy, symmetric) == ("int", 4, "group", True):
        told = (i.get("type"), i.get("num_bits", 8), strategy_of(i), i.get("dynamic"), bool(i.get("symmetric", True)))
        return "W4A8 FP8" if told == ("float", 8, "token", True, True) else None
    if i is None and packed and grouped and kind == "int":
        known = bits in (4, 8) or (symmetric and 2 <= bits <= 8)
        return "WNA16" if known and (strategy == "group" or size in (None, -1)) else None
    if group.format not in ACTIVATION_FORMATS:
        return None
    whole = symmetric and strategy in ("tensor", "channel", "block")
    if kind == "float" and bits == 8 and whole:
        if i is None:
            return "FP8 W8A16"
        static = bool(i.get("symmetric", True)) and strategy_of(i) == "tensor" and strategy != "block"
        if i.get("type") == "float" and (i.get("dynamic") is True or static):
            return "FP8 W8A8"
        return None
    if i is None or kind != "int" or i.get("type", "int") != "int" or i.get("num_bits", 8) != 8 or not symmetric:
        return None
    if bits == 8 and strategy in ("tensor", "channel"):
        if strategy_of(i) == "tensor" and not i.get("dynamic"):
            return "int8 W8A8, static"
        return "int8 W8A8, dynamic" if strategy_of(i) == "token" and i.get("dynamic") else None
    by_token = strategy_of(i) == "token" and bool(i.get("dynamic"))
    return "W4A8Int" if bits == 4 and grouped and by_token else None
