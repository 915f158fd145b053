"""What a run takes: bytes on disk, bits per weight, and memory at its peak, all from headers."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .config.recipe import AWQModifier
from .models.families import text_config

if TYPE_CHECKING:
    from .checkpoint.reader import Checkpoint
    from .config.run_config import RunConfig
    from .memory import Means
    from .models.families import Family
    from .plan import PlannedModule

# Room for tokenizer and other side files, and what the process itself takes (torch, threads, queues).
SIDE_FILES, PROCESS = 64 << 20, 340 << 20
# Of what a calibration works with, what malloc keeps besides.
KEPT = 1.2
# num_samples: -1 means all there are, which the plan does not count.
UNLIMITED_SAMPLES = 512
# What activations of all batches may take while they wait in front of a Linear, for one forward a layer instead of two.
# The same on every machine, since the two give different results.
HELD_BYTES = 4 << 30


@dataclass(frozen=True)
class Estimate:
    """Bytes: what the output takes, what the run needs at its peak, and what this machine has. Of `memory_bytes`,
    `gram_bytes` are for the Gram matrices of one layer's inputs, `held_bytes` for activations that wait.
    """

    source_bytes: int
    output_bytes: int
    bits_per_weight: float
    memory_bytes: int
    gram_bytes: int
    held_bytes: int
    memory_available: int | None
    disk_available: int


def estimate(
    config: RunConfig,
    checkpoint: Checkpoint,
    family: Family,
    modules: Mapping[str, PlannedModule],
    how: Means,
    *,
    smoothed: bool,
    stored_bytes: int,
    output_bytes: int,
) -> Estimate:
    """`stored_bytes`: of the tensors that quantized weights become; `output_bytes`: of all weight files."""
    weights = sum(m.rows * m.cols for m in modules.values())
    grams = gram_bytes(config, family, modules)
    held = held_bytes(config, checkpoint, family, modules, how) if grams or smoothed else 0
    if config.recipe.needs_data:
        work = _calibrated(config, checkpoint, family, modules, how, smoothed=smoothed) + grams + held
        memory = PROCESS + int(KEPT * work)
    else:
        memory = PROCESS + 2 * max((checkpoint.tensors[f"{name}.weight"].nbytes for name in modules), default=0)
    parent = next(p for p in [config.output_dir.absolute(), *config.output_dir.absolute().parents] if p.exists())
    return Estimate(
        source_bytes=checkpoint.total_bytes,
        output_bytes=output_bytes,
        bits_per_weight=8 * stored_bytes / weights if weights else 0.0,
        memory_bytes=memory,
        gram_bytes=grams,
        held_bytes=held,
        memory_available=_memory_available(),
        disk_available=shutil.disk_usage(parent).free,
    )


def _calibrated(
    config: RunConfig,
    checkpoint: Checkpoint,
    family: Family,
    modules: Mapping[str, PlannedModule],
    how: Means,
    *,
    smoothed: bool,
) -> int:
    """A layer as it lies in the file, in the forward and in the output, the hidden states of all tokens, and room for
    one GPTQ factor, its Gram matrix in order and its work. Smoothing holds a layer's weights in fp32 besides.
    """
    layers: Counter[str] = Counter()
    for name, info in checkpoint.tensors.items():
        layers[str(family.layer_of(name))] += info.nbytes
    widest = max((m.cols for m in modules.values() if m.modifier.kind == "gptq"), default=0)
    states = _tokens(config) * _hidden(checkpoint) * 2 if how.offload == "memory" else 0
    return (5 if smoothed else 3) * max(layers.values()) + states + 3 * 4 * widest**2


def _tokens(config: RunConfig) -> int:
    if config.dataset is None:
        return 0
    samples = config.dataset.num_samples if config.dataset.num_samples > 0 else UNLIMITED_SAMPLES
    return samples * config.dataset.max_seq_length


def _hidden(checkpoint: Checkpoint) -> int:
    return int(text_config(checkpoint.config).get("hidden_size", 0))


def held_bytes(
    config: RunConfig, checkpoint: Checkpoint, family: Family, modules: Mapping[str, PlannedModule], how: Means
) -> int:
    """Where one forward serves a layer: for each token the widest input, the norm's output and the residual. The sweep
    measures what it is, and takes two forwards if it is more than HELD_BYTES.
    """
    forwards = how.forwards
    if forwards == 2 or any(isinstance(modifier, AWQModifier) for modifier in config.recipe.modifiers):
        return 0
    routed = {family.layer_of(f"{name}.weight") for name in modules if family.is_expert(name)}
    widths = [m.cols for m in modules.values() if family.layer_of(f"{m.name}.weight") not in routed]
    held = _tokens(config) * 2 * (max(widths) + 2 * _hidden(checkpoint)) if widths else 0
    return 0 if forwards == "auto" and held > HELD_BYTES else held


def gram_bytes(config: RunConfig, family: Family, modules: Mapping[str, PlannedModule]) -> int:
    """fp32 [in, in] for each distinct input of the layer that has most of them: all that GPTQ quantizes, and with AWQ
    all that become integers. Linears that read one input share it; each expert sees its own tokens.
    """
    awq = any(isinstance(modifier, AWQModifier) for modifier in config.recipe.modifiers)
    needed = [m.name for m in modules.values() if m.modifier.kind == "gptq" or (awq and m.scheme.weights.type == "int")]
    first = {member: members[0] for members in family.fused_sets(modules) for member in members}
    inputs = {first.get(name, name): modules[name].cols for name in needed}
    layers: Counter[int | None] = Counter()
    for name, cols in inputs.items():
        layers[family.layer_of(f"{name}.weight")] += 4 * cols * cols
    return max(layers.values(), default=0)


def shortages(config: RunConfig, found: Estimate) -> Iterable[str]:
    """What this machine lacks for the run, and what to do about it."""
    needed = found.output_bytes + SIDE_FILES
    if found.disk_available < needed:
        yield (
            f"{config.output_dir}: the output takes {needed / 1e9:.1f} GB and only "
            f"{found.disk_available / 1e9:.1f} GB are free; choose another global.save_path or make room"
        )
    budget = config.global_.memory_budget_bytes
    limits = [(found.memory_available, "{:.1f} GB are available", ", or close other programs")]
    limits += [(budget, "global.memory_budget is {:.1f} GB", ", or raise it")]
    for limit, there, otherwise in limits:
        if limit is not None and limit < found.memory_bytes:
            grams = f" ({found.gram_bytes / 1e9:.1f} GB of it for Gram matrices)" if found.gram_bytes else ""
            fewer = "set global.calibration_forwards to 2, " if found.held_bytes else ""
            yield (
                f"the run needs about {found.memory_bytes / 1e9:.1f} GB of memory{grams} and "
                f"{there.format(limit / 1e9)}; {fewer}lower dataset.num_samples or max_seq_length{otherwise}"
            )


def _memory_available() -> int | None:
    """MemAvailable of this machine in bytes, None where the system does not tell."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", text)
    return int(found.group(1)) * 1024 if found else None
