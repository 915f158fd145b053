"""The plan: everything that will happen, fixed from config.json and safetensors headers before a weight is read.

It says which Linear gets which scheme, what every ignore pattern matched, and the output byte for byte: names,
dtypes, shapes, shards and offsets. Whatever cannot work is refused here, with all layers that are concerned.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint.layout import Layout, OutputTensor, plan_layout
from .checkpoint.reader import Checkpoint
from .config.run_config import RunConfig
from .config.schemes import QuantizationScheme
from .errors import PlanError, nearest
from .formats import Format, format_by_name
from .models.families import Family, family_of

FLOATS = ("BF16", "F16", "F32")
# Room for tokenizer and other side files, and what the process itself takes (torch, threads, queues).
SIDE_FILES, PROCESS = 64 << 20, 300 << 20
# num_samples: -1 means all there are, which the plan does not count.
UNLIMITED_SAMPLES = 512
TENSOR_PARALLEL = (2, 4, 8)
# Linears whose input is split over ranks (their output is summed); all others split their output.
ROW_PARALLEL = re.compile(r"(^|\.)(o_proj|out_proj|down_proj|w2|dense_4h_to_h|fc2)$")
EMBEDDING = re.compile(r"(^|[._])embed\w*\.weight$|(^|\.)(wte|wpe)\.weight$|norm\d*\.weight$")


@dataclass(frozen=True)
class PlannedModule:
    """A Linear that will be quantized: its weight is `<name>.weight` [rows, cols] = [out, in] in `dtype`."""

    name: str
    rows: int
    cols: int
    dtype: str


@dataclass(frozen=True)
class Estimate:
    """Bytes: what the output takes, what the run needs at its peak, and what this machine has."""

    source_bytes: int
    output_bytes: int
    bits_per_weight: float
    memory_bytes: int
    memory_available: int | None
    disk_available: int


@dataclass(frozen=True)
class Plan:
    """What `run` will do; see `build_plan`."""

    config: RunConfig
    checkpoint: Checkpoint
    family: Family
    format: Format
    scheme: QuantizationScheme
    modules: dict[str, PlannedModule]
    carried: tuple[str, ...]
    ignore: tuple[str, ...]
    ignore_matches: dict[str, tuple[str, ...]]
    layout: Layout
    config_json: dict[str, Any]
    estimate: Estimate
    warnings: tuple[str, ...]
    shortages: tuple[str, ...]

    def require_room(self) -> None:
        """PlanError if this machine lacks the memory or the disk that the run needs."""
        if self.shortages:
            raise PlanError("; ".join(self.shortages))


def build_plan(config: RunConfig, checkpoint: Checkpoint) -> Plan:
    """Make the plan, or raise PlanError / ConfigError with what does not fit and what to do."""
    scheme, fmt = config.recipe.groups[0].scheme, format_by_name(config.save_name)
    fmt.check(scheme)
    if checkpoint.config.get("quantization_config") is not None:
        method = checkpoint.config["quantization_config"].get("quant_method", "?")
        raise PlanError(
            f"{checkpoint.folder}: already quantized (quantization_config in config.json, quant_method '{method}'); "
            "start from the full-precision checkpoint"
        )
    family = family_of(checkpoint.config)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    all_modules = [*(n.removesuffix(".weight") for n in shapes if n.endswith(".weight")), *family.heads[:1]]
    matches = match_ignore(config.ignore, list(dict.fromkeys(all_modules)))
    ignored = {name for names in matches.values() for name in names}
    # The head stays in full precision: servers do not read it quantized unless told in ways that differ.
    linears = [linear.module for linear in family.linear_weights(shapes) if not linear.head]
    chosen = [name for name in linears if name not in ignored]
    if not chosen:
        raise PlanError(
            f"{checkpoint.folder}: nothing is left to quantize: of {len(linears)} Linears, ignore_layers "
            f"({', '.join(config.ignore) or 'empty'}) takes {len(ignored & set(linears))} out"
        )
    modules = {name: _planned(name, checkpoint) for name in chosen}
    warnings = [] if family.known else [_unknown_family(checkpoint)]
    if stacked := family.fused_experts(shapes):
        warnings.append(
            f"{len(stacked)} expert weights stored as one 3-D tensor each (e.g. {stacked[0]}) stay in full precision"
        )
    _check_fused_sets(family, linears, modules)
    _check_divisible(scheme, modules.values())
    warnings += _tensor_parallel_warnings(scheme, modules.values())
    ignore = _kept_linears(family, shapes, modules)
    outputs, carried = _outputs(checkpoint, fmt, scheme, modules)
    layout = plan_layout(outputs, config.global_.max_shard_bytes)
    config_json = dict(checkpoint.config)
    config_json["quantization_config"] = fmt.config_block(scheme, ignore, config.ignore)
    estimate = _estimate(config, checkpoint, family, modules, outputs, layout)
    return Plan(
        config,
        checkpoint,
        family,
        fmt,
        scheme,
        modules,
        tuple(carried),
        ignore,
        matches,
        layout,
        config_json,
        estimate,
        tuple(warnings),
        tuple(_shortages(config, estimate)),
    )


def match_ignore(patterns: Iterable[str], modules: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """For each pattern the modules it takes out; PlanError for one that matches nothing.

    `re:` patterns match from the start of the full name, as vLLM does; others match the full name or a run of
    its dotted parts (`lm_head`, `down_proj`, `mlp.gate`, `layers.0`).
    """
    result: dict[str, tuple[str, ...]] = {}
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                regex = re.compile(pattern[3:])
            except re.error as error:
                raise PlanError(f"ignore_layers: '{pattern}' is not a regular expression: {error}") from None
            found = tuple(name for name in modules if regex.match(name))
        else:
            found = tuple(name for name in modules if f".{pattern}." in f".{name}.")
        if not found:
            parts = {part for name in modules for part in (name, name.rpartition(".")[2])}
            raise PlanError(
                f"ignore_layers: '{pattern}' matches nothing in this model{nearest(pattern, sorted(parts))}; "
                "give a full name, dotted parts of one, or a regular expression with 're:' in front"
            )
        result[pattern] = found
    return result


def _kept_linears(
    family: Family, shapes: Mapping[str, tuple[int, ...]], modules: Mapping[str, PlannedModule]
) -> tuple[str, ...]:
    """Full names of whatever a server may hold as a Linear and finds unquantized: routers, ignored layers, towers,
    the head (also a tied one, which has no tensor of its own).
    """
    kept = [
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if len(shape) == 2 and name.endswith(".weight") and EMBEDDING.search(name) is None
    ]
    return tuple(dict.fromkeys(name for name in (*kept, *family.heads[:1]) if name not in modules))


def _planned(name: str, checkpoint: Checkpoint) -> PlannedModule:
    info = checkpoint.tensors[f"{name}.weight"]
    if info.dtype not in FLOATS:
        raise PlanError(
            f"{name}.weight: dtype {info.dtype} cannot be quantized; quantkit starts from {', '.join(FLOATS)}"
        )
    return PlannedModule(name, info.shape[0], info.shape[1], info.dtype)


def _unknown_family(checkpoint: Checkpoint) -> str:
    model_type = checkpoint.config.get("model_type", "?")
    return f"model_type '{model_type}' is not in quantkit's table; Llama-shaped names are assumed, check the list below"


def _check_fused_sets(family: Family, linears: Sequence[str], modules: dict[str, PlannedModule]) -> None:
    """Servers fuse q/k/v and gate/up, and load experts by the first one's scheme: each set is taken or left whole."""
    experts: dict[str, list[str]] = {}
    for name in linears:
        if family.is_expert(name):
            experts.setdefault(name.partition(".experts.")[0], []).append(name)
    for members in [*family.fused_sets(linears), *map(tuple, experts.values())]:
        taken = [name for name in members if name in modules]
        if taken and len(taken) < len(members):
            left = next(name for name in members if name not in modules)
            raise PlanError(
                f"ignore_layers takes {left} out but leaves {taken[0]} in; servers fuse these "
                f"({', '.join(n.rpartition('.')[2] for n in members[:4])}{', ...' if len(members) > 4 else ''}) "
                "into one layer: ignore all of them or none"
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
    checkpoint: Checkpoint, fmt: Format, scheme: QuantizationScheme, modules: dict[str, PlannedModule]
) -> tuple[list[OutputTensor], list[str]]:
    outputs: list[OutputTensor] = []
    carried: list[str] = []
    for name, info in checkpoint.tensors.items():
        module = modules.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if module is None:
            outputs.append(OutputTensor(name, info.dtype, info.shape))
            carried.append(name)
        else:
            outputs += fmt.stored_tensors(module.name, scheme, module.rows, module.cols, module.dtype)
    clashes = [name for name, count in Counter(t.name for t in outputs).items() if count > 1]
    if clashes:
        raise PlanError(f"{checkpoint.folder}: already has tensors that the output would add, e.g. {clashes[0]}")
    return outputs, carried


def _estimate(
    config: RunConfig,
    checkpoint: Checkpoint,
    family: Family,
    modules: dict[str, PlannedModule],
    outputs: Sequence[OutputTensor],
    layout: Layout,
) -> Estimate:
    weights = sum(m.rows * m.cols for m in modules.values())
    carried = {name for name in checkpoint.tensors if name.removesuffix(".weight") not in modules}
    stored = sum(t.nbytes for t in outputs if t.name not in carried)
    largest = max(checkpoint.tensors[f"{name}.weight"].nbytes for name in modules)
    memory = PROCESS + 2 * largest
    if config.recipe.needs_data and config.dataset is not None:
        layers: Counter[str] = Counter()
        for name, info in checkpoint.tensors.items():
            layers[str(family.layer_of(name))] += info.nbytes
        hidden = int(checkpoint.config.get("hidden_size", 0))
        samples = config.dataset.num_samples if config.dataset.num_samples > 0 else UNLIMITED_SAMPLES
        tokens = samples * config.dataset.max_seq_length
        memory = PROCESS + 3 * max(layers.values()) + tokens * hidden * 2
    parent = next(p for p in [config.output_dir.absolute(), *config.output_dir.absolute().parents] if p.exists())
    return Estimate(
        source_bytes=checkpoint.total_bytes,
        output_bytes=layout.file_bytes,
        bits_per_weight=8 * stored / weights,
        memory_bytes=memory,
        memory_available=_memory_available(),
        disk_available=shutil.disk_usage(parent).free,
    )


def _memory_available() -> int | None:
    """MemAvailable of this machine in bytes, None where the system does not tell."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", text)
    return int(found.group(1)) * 1024 if found else None


def _shortages(config: RunConfig, estimate: Estimate) -> list[str]:
    found = []
    needed = estimate.output_bytes + SIDE_FILES
    if estimate.disk_available < needed:
        found.append(
            f"{config.output_dir}: the output takes {needed / 1e9:.1f} GB and only "
            f"{estimate.disk_available / 1e9:.1f} GB are free; choose another global.save_path or make room"
        )
    if estimate.memory_available is not None and estimate.memory_available < estimate.memory_bytes:
        found.append(
            f"the run needs about {estimate.memory_bytes / 1e9:.1f} GB of memory and "
            f"{estimate.memory_available / 1e9:.1f} GB are available; lower dataset.num_samples or max_seq_length, "
            "or close other programs"
        )
    return found


def collapse(name: str) -> str:
    """`model.layers.3.mlp.experts.17.up_proj` -> `model.layers.*.mlp.experts.*.up_proj`."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def config_bytes(plan: Plan) -> bytes:
    """config.json of the output."""
    return (json.dumps(plan.config_json, indent=2, ensure_ascii=False) + "\n").encode()
