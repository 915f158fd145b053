"""The plan: everything that will happen, fixed from config.json and safetensors headers before a weight is read.

It says which Linear gets which scheme, what every ignore pattern matched, and the output byte for byte: names,
dtypes, shapes, shards and offsets. Whatever cannot work is refused here, with all layers that are concerned.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .attentions import attention_group, attentions_of, cache_shape, query_heads, require_place
from .checkpoint.dtypes import torch_dtype
from .checkpoint.layout import Layout, OutputTensor, plan_layout
from .checkpoint.reader import Checkpoint
from .config.attention import AttentionGroup
from .config.groups import SchemeGroup
from .config.recipe import AWQModifier, QuantizationModifier, Recipe, SmoothQuantModifier
from .config.run_config import RunConfig
from .config.schemes import QuantizationArgs, QuantizationScheme
from .errors import PlanError
from .estimate import Estimate, estimate, shortages
from .formats import Format, format_by_name, written_config
from .formats.attention import query_tensor, with_attention
from .formats.rows import by_rows
from .formats.stacked_source import unsplit
from .memory import Means, means
from .models.families import Family, family_of
from .models.mappings import Smoothing, smoothings
from .models.stacked_experts import STACKINGS, UNREAD
from .targets import assign, match_ignore, served, served_targets

if TYPE_CHECKING:
    import torch

    from .calibration.statistics_check import StatisticsFile

FLOATS = ("BF16", "F16", "F32")
TENSOR_PARALLEL = (2, 4, 8)
# Linears whose input is split over ranks (their output is summed); all others split their output.
ROW_PARALLEL = re.compile(r"(^|\.)(o_proj|out_proj|down_proj|w2|dense_4h_to_h|fc2)$")
EMBEDDING = re.compile(r"(^|[._])embed\w*\.weight$|(^|\.)(wte|wpe)\.weight$|norm\d*\.weight$")


@dataclass(frozen=True)
class PlannedModule:
    """A Linear that will be quantized: its weight is `<name>.weight` [rows, cols] = [out, in] in `dtype`. `modifier`
    is the one that quantizes it.
    """

    name: str
    rows: int
    cols: int
    dtype: str
    scheme: QuantizationScheme
    modifier: QuantizationModifier


@dataclass(frozen=True)
class Plan:
    """What `run` will do; see `build_plan`.

    `groups`: the recipe's groups that took a Linear. `smoothings`: places by the modifier's index in the recipe.
    `carried`: tensors copied byte for byte. `rewritten`: tensors that keep name, dtype and shape, and whose values a
    transform changes. `attentions`: modules that get KV-cache scales, if `kv_cache` is not None, and scales of queries
    with `attention`, whose one target is their class. `ignore`: full names of all Linears that stay in full precision;
    `ignore_matches`: what each of the user's patterns took out. `statistics`: those that stand in for running the
    model.
    """

    config: RunConfig
    checkpoint: Checkpoint
    family: Family
    format: Format
    modules: dict[str, PlannedModule]
    groups: tuple[SchemeGroup, ...]
    smoothings: dict[int, tuple[Smoothing, ...]]
    carried: tuple[str, ...]
    rewritten: frozenset[str]
    kv_cache: QuantizationArgs | None
    attention: AttentionGroup | None
    attentions: tuple[str, ...]
    ignore: tuple[str, ...]
    ignore_matches: dict[str, tuple[str, ...]]
    layout: Layout
    config_json: dict[str, Any]
    estimate: Estimate
    warnings: tuple[str, ...]
    shortages: tuple[str, ...]
    means: Means
    statistics: StatisticsFile | None = None

    @property
    def recipe(self) -> Recipe:
        """What is done, modifier by modifier."""
        return self.config.recipe

    def scale_dtype(self, module: str) -> torch.dtype:
        """What the format stores `module`'s weight scale in; codes are made with scales rounded to it."""
        planned = self.modules[module]
        return torch_dtype(self.format.scale_dtype(planned.scheme, planned.dtype))

    def packs(self, module: str) -> bool:
        """Whether `module`'s codes go into int32 words."""
        return self.format.packs(self.modules[module].scheme)

    def require_room(self) -> None:
        """PlanError if this machine lacks the memory or the disk that the run needs."""
        if self.shortages:
            raise PlanError("; ".join(self.shortages))

    def record(self) -> dict[str, Any]:
        """What the audit has to know about how the output was made, in plain types: how each Linear was quantized
        ("rtn", "gptq", "awq"), whose weights a transform rescaled (columns, rows or both), and which other tensors it
        changed.
        """
        places = [place for group in self.smoothings.values() for place in group]
        columns, rows = {m for place in places for m in place.balance}, {place.smooth for place in places}
        rescaled = {
            name: " and ".join(word for word, where in (("columns", columns), ("rows", rows)) if name in where)
            for name in self.modules
        }
        clips = any(isinstance(modifier, AWQModifier) and modifier.clip for modifier in self.recipe.modifiers)
        return {
            "methods": {name: _method(module, clips) for name, module in self.modules.items()},
            "rescaled": {name: what for name, what in rescaled.items() if what},
            "rewritten": sorted(self.rewritten),
        }


def _method(module: PlannedModule, clips: bool) -> str:
    """How it is quantized. AWQ `clips` ranges also of what it does not rescale."""
    weights = module.scheme.weights
    clipped = clips and module.modifier.kind == "rtn" and (weights.type, weights.num_bits) == ("int", 4)
    return "awq" if clipped else module.modifier.kind


def build_plan(config: RunConfig, checkpoint: Checkpoint, ranks: int = 1, here: int = 1) -> Plan:
    """Make the plan, or raise PlanError / ConfigError with what does not fit and what to do. `ranks` processes will
    work on it, `here` of them on one machine; nothing but what they take depends on that.
    """
    recipe, fmt = config.recipe, format_by_name(config.save_name)
    for group in recipe.groups:
        fmt.check(group.scheme)
    require_place(recipe, fmt)
    if checkpoint.config.get("quantization_config") is not None:
        method = checkpoint.config["quantization_config"].get("quant_method", "?")
        raise PlanError(
            f"{checkpoint.folder}: already quantized (quantization_config in config.json, quant_method '{method}'); "
            "start from the full-precision checkpoint. Of quantized ones, FP8 in blocks is read (quant_method 'fp8' "
            "with weight_block_size, as DeepSeek and Qwen publish it), and experts in MXFP4 as those of gpt-oss"
        )
    if config.model.torch_dtype == "fp8" and not checkpoint.dequantized:
        raise PlanError(f"model.torch_dtype: 'fp8', but {checkpoint.folder} is not in FP8; leave it out")
    family = family_of(checkpoint.config)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    weights = [name.removesuffix(".weight") for name in shapes if name.endswith(".weight")]
    all_modules = [*weights, *family.heads[:1], "lm_head"]  # which every model has for Transformers
    key = "ignore" if config.compression.quantization is None else "ignore_layers"
    matches = match_ignore(key, config.ignore, list(dict.fromkeys(all_modules)))
    # The head stays in full precision: servers do not read it quantized unless told in ways that differ.
    linears = [linear.module for linear in family.linear_weights(shapes) if not linear.head]
    assigned = assign(recipe, linears, family.heads, matches)
    if not assigned and recipe.groups:
        ignored = {name for names in matches.values() for name in names}
        raise PlanError(
            f"{checkpoint.folder}: nothing is left to quantize: of {len(linears)} Linears, {key} "
            f"({', '.join(config.ignore) or 'empty'}) takes {len(ignored & set(linears))} out"
        )
    modules = {name: _planned(name, checkpoint, found.group.scheme, found.modifier) for name, found in assigned.items()}
    warnings = [] if family.known else [_unknown_family(checkpoint)]
    if checkpoint.dequantized:
        coded = checkpoint.dequantized & checkpoint.tensors.keys()
        kind = "MXFP4" if family.model_type == "gpt_oss" else "FP8"
        dtype = checkpoint.tensors[next(iter(coded))].dtype
        warnings.append(f"the source is in {kind}: {len(coded)} weights are dequantized to {dtype} as they are read")
    if (unread := UNREAD.get(family.model_type)) and any(family.is_expert(name) for name in modules):
        warnings.append(
            f"{', '.join(unread)}: no room for quantized experts of {family.model_type}, which are left out; for them "
            "ignore 're:.*experts.*'"
        )
    groups = tuple(group for group in recipe.groups if any(a.group is group for a in assigned.values()))
    _check_fused_sets(family, linears, modules)
    for scheme in dict.fromkeys(m.scheme for m in modules.values()):
        members = [m for m in modules.values() if m.scheme == scheme]
        _check_divisible(scheme, members)
        warnings += _tensor_parallel_warnings(scheme, members)
    places, notes = _smoothings(recipe, family, shapes, modules)
    warnings += notes
    rewritten = _rewritten(places, modules, shapes)
    # Stacked experts that nothing happens to stay as they are, if that is how clients read them.
    changed = rewritten | {f"{name}.weight" for name in modules}
    stacks = family.model_type in STACKINGS and not STACKINGS[family.model_type].apart
    checkpoint = unsplit(checkpoint, lambda _, parts: stacks and changed.isdisjoint(parts))
    if stacked := family.fused_experts({name: info.shape for name, info in checkpoint.tensors.items()}):
        warnings.append(
            f"{len(stacked)} expert weights stored as one 3-D tensor each (e.g. {stacked[0]}) stay in full precision"
        )
    attentions = attentions_of(recipe, family, checkpoint, shapes)
    if recipe.kv_cache is not None and recipe.kv_cache.type == "int" and fmt.NAME != "mindie":
        warnings.append("an int8 KV cache: vLLM reads FP8 ones only, and refuses this model; Transformers reads it")
    if any(m.scheme.weights.actorder == "group" for m in modules.values()):
        warnings.append(
            "actorder 'group': compressed-tensors from 0.19 on refuses it, and so do Transformers and servers that use "
            "it, and vLLM 0.32 in GPTQ's format, too; actorder 'weight' is about as good and read by all"
        )
    ignore = kept_linears(family, shapes, modules)
    outputs, carried, stored_bytes = _outputs(checkpoint, fmt, modules, rewritten)
    if recipe.kv_cache is not None:
        for attention in attentions:
            outputs += fmt.kv_tensors(attention, recipe.kv_cache, cache_shape(checkpoint, attention))
    queries = attention_group(config, family, checkpoint, attentions)
    if queries is not None:
        heads = query_heads(checkpoint.config) or 1
        outputs += [query_tensor(attention, queries.args, heads) for attention in attentions]
    clashes = [name for name, count in Counter(t.name for t in outputs).items() if count > 1]
    if clashes:
        raise PlanError(f"{checkpoint.folder}: already has tensors that the output would add, e.g. {clashes[0]}")
    stem = fmt.stem([group.scheme for group in groups])
    layout = plan_layout(outputs, config.global_.max_shard_bytes, stem=stem)
    config_json = dict(checkpoint.config)
    written = served_targets({name: m.scheme for name, m in modules.items()})
    told = (*ignore, *family.elsewhere(ignore)) if fmt.NAME == "compressed-tensors" else ignore
    block = fmt.config_block(written, told, config.ignore, recipe.kv_cache)
    config_json["quantization_config"] = with_attention(block, queries.targets, queries.args) if queries else block
    whole = [
        checkpoint.tensors[f"{name}.weight"].nbytes
        for name, m in modules.items()
        if by_rows(fmt, name, m.scheme, m.rows, m.cols) is None or f"{name}.weight" in checkpoint.gathered
    ] + [checkpoint.tensors[name].nbytes for name in carried if name in checkpoint.remade]
    found = estimate(
        config,
        checkpoint,
        family,
        modules,
        places=[place for group in places.values() for place in group],
        stored_bytes=stored_bytes,
        output_bytes=layout.file_bytes,
        ranks=ranks,
        here=here,
        whole=max(whole, default=0),
    )
    if found.choice is not None and found.choice.forwards_chosen:
        why = "low_memory" if config.global_.memory_budget is None else f"memory_budget {config.global_.memory_budget}"
        warnings.append(
            f"{why} leaves no room for one forward a layer: each takes two, which gives other results, about as good"
        )
    return Plan(
        config,
        checkpoint,
        family,
        fmt,
        modules,
        groups,
        places,
        tuple(carried),
        rewritten,
        recipe.kv_cache,
        queries,
        attentions,
        ignore,
        matches,
        layout,
        config_json,
        found,
        tuple(warnings),
        tuple(shortages(config, found)),
        found.choice.means if found.choice is not None else means(config),
    )


def kept_linears(family: Family, shapes: Mapping[str, tuple[int, ...]], modules: Container[str]) -> tuple[str, ...]:
    """Full names of whatever a server may hold as a Linear and finds unquantized: routers, ignored layers, towers,
    the head (also a tied one, which has no tensor of its own).
    """
    kept = [
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if len(shape) == 2 and name.endswith(".weight") and EMBEDDING.search(name) is None
    ]
    return tuple(dict.fromkeys(name for name in (*kept, *family.heads[:1]) if name not in modules))


def _smoothings(
    recipe: Recipe, family: Family, shapes: Mapping[str, tuple[int, ...]], modules: Mapping[str, PlannedModule]
) -> tuple[dict[int, tuple[Smoothing, ...]], list[str]]:
    """Where each transform of the recipe works, by its index there. A place whose readers all stay in full precision is
    none: nothing would get better, and its weights would only be rounded once more.
    """
    found, warnings = {}, []
    for index, modifier in enumerate(recipe.modifiers):
        if not isinstance(modifier, SmoothQuantModifier | AWQModifier):
            continue
        places, notes = smoothings(modifier, family, shapes)
        found[index] = tuple(place for place in places if any(m in modules for m in place.balance))
        warnings += [f"{type(modifier).__name__}: {note}" for note in notes]
        if not found[index]:
            warnings.append(f"{type(modifier).__name__} has nothing to do: no layer that it balances is quantized")
    return found, warnings


def _rewritten(
    places: Mapping[int, Sequence[Smoothing]],
    modules: Mapping[str, PlannedModule],
    shapes: Mapping[str, tuple[int, ...]],
) -> frozenset[str]:
    """Tensors that smoothing changes and that are not quantized."""
    found = set()
    for place in (place for group in places.values() for place in group):
        found |= {f"{module}.weight" for module in (place.smooth, *place.balance) if module not in modules}
        found |= {f"{place.smooth}.bias"} & shapes.keys()
    return frozenset(found)


def _planned(
    name: str, checkpoint: Checkpoint, scheme: QuantizationScheme, modifier: QuantizationModifier
) -> PlannedModule:
    info = checkpoint.tensors[f"{name}.weight"]
    if info.dtype not in FLOATS:
        raise PlanError(
            f"{name}.weight: dtype {info.dtype} cannot be quantized; quantkit starts from {', '.join(FLOATS)}"
        )
    return PlannedModule(name, info.shape[0], info.shape[1], info.dtype, scheme, modifier)


def _unknown_family(checkpoint: Checkpoint) -> str:
    model_type = checkpoint.config.get("model_type", "?")
    return f"model_type '{model_type}' is not in quantkit's table; Llama-shaped names are assumed, check the list below"


def _check_fused_sets(family: Family, linears: Sequence[str], modules: dict[str, PlannedModule]) -> None:
    """Servers fuse q/k/v and gate/up, and load experts by the first one's scheme: each set is taken with one scheme, or
    left whole.
    """
    experts: dict[str, list[str]] = {}
    for name in linears:
        if family.is_expert(name):
            experts.setdefault(name.partition(".experts.")[0], []).append(name)
    for members in [*family.fused_sets(linears), *map(tuple, experts.values())]:
        taken = [name for name in members if name in modules]
        parts = f"{', '.join(n.rpartition('.')[2] for n in members[:4])}{', ...' if len(members) > 4 else ''}"
        if taken and len(taken) < len(members):
            left = next(name for name in members if name not in modules)
            raise PlanError(
                f"the recipe takes {left} out but leaves {taken[0]} in; servers fuse these ({parts}) into one layer: "
                "quantize all of them or none, by targets and ignore"
            )
        other = next((name for name in taken if served(modules[name].scheme) != served(modules[taken[0]].scheme)), None)
        if other is not None:
            one, two = modules[taken[0]], modules[other]
            raise PlanError(
                f"{one.name} has scheme {one.scheme.name} and {two.name} has {two.scheme.name}; servers fuse these "
                f"({parts}) into one layer with one scheme: give all of them the same targets"
            )


def _check_divisible(scheme: QuantizationScheme, modules: Iterable[PlannedModule]) -> None:
    args = scheme.weights
    size = args.group_size or (args.block_structure[1] if args.block_structure else None)
    if size is None:
        return
    bad = Counter(f"{collapse(m.name)} (in = {m.cols})" for m in modules if m.cols % size)
    if not bad:
        return
    widths = [m.cols for m in modules]
    fits = [g for g in (128, 64, 32) if all(width % g == 0 for width in widths)]
    if scheme.weights.strategy == "group" and fits:
        advice = f"set quant_method.group_size to {fits[0]}, or add these layers to ignore_layers"
    else:
        advice = "add these layers to ignore_layers, or choose a per-channel scheme"
    listed = "; ".join(f"{name} x{count}" for name, count in bad.items())
    raise PlanError(f"scheme {scheme.name}: the input width is not divisible by {size} in {listed}; {advice}")


def _tensor_parallel_warnings(scheme: QuantizationScheme, modules: Iterable[PlannedModule]) -> list[str]:
    """Groups and blocks must also divide each rank's share when a server splits a layer."""
    args, warnings = scheme.weights, []
    modules = list(modules)
    for ranks in TENSOR_PARALLEL:
        bad: Counter[str] = Counter()
        for m in modules:
            row_parallel = ROW_PARALLEL.search(m.name) is not None
            width = m.cols if row_parallel else m.rows
            unit = 1
            if row_parallel and args.group_size:
                unit = args.group_size
            elif args.block_structure:
                unit = args.block_structure[1] if row_parallel else args.block_structure[0]
            if width % ranks or (width // ranks) % unit:
                bad[f"{collapse(m.name)} ({width} / {ranks}" + (f" by {unit})" if unit > 1 else ")")] += 1
        if bad:
            listed = "; ".join(f"{name} x{count}" for name, count in bad.items())
            warnings.append(f"tensor parallel size {ranks} will not split evenly: {listed}")
    return warnings


def _outputs(
    checkpoint: Checkpoint, fmt: Format, modules: Mapping[str, PlannedModule], rewritten: frozenset[str]
) -> tuple[list[OutputTensor], list[str], int]:
    """The tensors to write, those of them that are copied, and the bytes that quantized weights become."""
    outputs: list[OutputTensor] = []
    carried: list[str] = []
    stored_bytes = 0
    for name, info in checkpoint.tensors.items():
        module = modules.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if module is None:
            outputs.append(OutputTensor(name, info.dtype, info.shape))
            if name not in rewritten:
                carried.append(name)
        else:
            stored = fmt.stored_tensors(module.name, module.scheme, module.rows, module.cols, module.dtype)
            outputs += stored
            stored_bytes += sum(t.nbytes for t in stored)
    return outputs, carried, stored_bytes


def collapse(name: str) -> str:
    """`model.layers.3.mlp.experts.17.up_proj` -> `model.layers.*.mlp.experts.*.up_proj`."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def config_bytes(plan: Plan) -> bytes:
    """config.json of the output, with the format's block where that is its place."""
    return (json.dumps(written_config(plan.format, plan.config_json), indent=2, ensure_ascii=False) + "\n").encode()
