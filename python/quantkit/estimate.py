"""What a run takes: bytes on disk, bits per weight, and memory at its peak, all from headers."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoint.staging import reclaimable_bytes
from .memory import HELD_BYTES, PROCESS, Choice, Demand, choose
from .report.table import size

if TYPE_CHECKING:
    from .checkpoint.reader import Checkpoint
    from .config.run_config import RunConfig
    from .models.families import Family
    from .models.mappings import Smoothing
    from .plan import PlannedModule

__all__ = ["HELD_BYTES", "Estimate", "estimate", "memory_available", "shortages"]

# Room for tokenizer and other side files.
SIDE_FILES = 64 << 20
# What a run without data takes whose weights go from file to file: Python, the parts of each thread, and what is known
# of each tensor. As many threads are counted as a small machine has, so that plans do not differ.
FROM_FILES, PER_THREAD, THREADS, PER_TENSOR = 40 << 20, 4 << 20, 4, 6 << 10


@dataclass(frozen=True)
class Estimate:
    """Bytes: what the output takes, what the run needs at its peak, and what this machine has. Of `memory_bytes`,
    `gram_bytes` are for the Gram matrices of one layer's inputs, `held_bytes` for activations that wait. `choice`: what
    a calibrated run does to keep to its memory. With several `ranks`, of which `here` are on one machine, `rank_bytes`
    are what each of them needs.
    """

    source_bytes: int
    output_bytes: int
    bits_per_weight: float
    memory_bytes: int
    gram_bytes: int
    held_bytes: int
    memory_available: int | None
    disk_available: int
    choice: Choice | None = None
    ranks: int = 1
    here: int = 1
    rank_bytes: int = 0

    @property
    def machine_bytes(self) -> int:
        """What all ranks on one machine need."""
        return self.memory_bytes if self.ranks == 1 else self.here * self.rank_bytes


def estimate(
    config: RunConfig,
    checkpoint: Checkpoint,
    family: Family,
    modules: Mapping[str, PlannedModule],
    *,
    places: Iterable[Smoothing],
    stored_bytes: int,
    output_bytes: int,
    ranks: int = 1,
    here: int = 1,
    whole: int = 0,
) -> Estimate:
    """`places`: what is smoothed; `stored_bytes`: of the tensors that quantized weights become; `output_bytes`: of all
    weight files; `whole`: of the largest weight that a run without data has in memory as a whole. The means are those
    of one process whatever the number of `ranks`, since results may depend on them.
    """
    weights = sum(m.rows * m.cols for m in modules.values())
    places = list(places)
    demand, available = Demand(config, checkpoint, family, modules, places), memory_available()
    choice = choose(demand, available) if config.recipe.needs_data else None
    if choice is not None:
        memory = choice.peak
        each = Demand(config, checkpoint, family, modules, places, ranks).peak(choice.means)
    else:
        parts = PER_THREAD * (config.global_.num_threads or THREADS) + PER_TENSOR * len(checkpoint.tensors)
        each = memory = PROCESS + 2 * whole if whole else FROM_FILES + parts
    parent = next(p for p in [config.output_dir.absolute(), *config.output_dir.absolute().parents] if p.exists())
    return Estimate(
        source_bytes=checkpoint.total_bytes,
        output_bytes=output_bytes,
        bits_per_weight=8 * stored_bytes / weights if weights else 0.0,
        memory_bytes=memory,
        gram_bytes=demand.gram_bytes,
        held_bytes=demand.held(choice.means.forwards) if choice is not None else 0,
        memory_available=available,
        disk_available=shutil.disk_usage(parent).free + reclaimable_bytes(config.output_dir.absolute()),
        choice=choice,
        ranks=ranks,
        here=here,
        rank_bytes=each,
    )


def shortages(config: RunConfig, found: Estimate) -> Iterable[str]:
    """What this machine lacks for the run, or the run's budget, and what to do about it."""
    scratch = found.choice.scratch if found.choice is not None else 0
    needed = found.output_bytes + SIDE_FILES + scratch
    if found.disk_available < needed:
        states = f", {size(scratch)} of it for hidden states," if scratch else ""
        yield (
            f"{config.output_dir}: the output takes {needed / 1e9:.1f} GB{states} and only "
            f"{found.disk_available / 1e9:.1f} GB are free; choose another global.save_path or make room"
        )
    budget = config.global_.memory_budget_bytes
    if found.ranks > 1 and found.memory_available is not None and found.memory_available < found.machine_bytes:
        yield (
            f"{found.here} ranks on this machine need at least about {size(found.rank_bytes)} of memory each, "
            f"{size(found.machine_bytes)} together, and {size(found.memory_available)} are available; start fewer, or "
            "close other programs"
        )
    limits = [(found.memory_available, "{} are available", "close other programs")] if found.ranks == 1 else []
    limits += [(budget, "global.memory_budget is {}", "raise it")]
    for limit, there, otherwise in limits:
        if limit is not None and limit < found.memory_bytes:
            whole = found.choice is None or found.choice.means.experts is None
            grams = f" ({size(found.gram_bytes)} of it for Gram matrices)" if found.gram_bytes and whole else ""
            rather = [] if found.choice is None else [found.choice.advice]
            if found.choice is not None and found.choice.advice:
                rather = [f"{found.choice.advice}, which takes about {size(found.choice.least)}"]
            if config.recipe.needs_data:
                rather.append("lower dataset.num_samples or max_seq_length")
            bound = f" (experts cannot come in groups: {why})" if (why := found.choice and found.choice.bound) else ""
            yield (
                f"the run needs at least about {size(found.memory_bytes)} of memory{grams} and "
                f"{there.format(size(limit))}{bound}; {', '.join(filter(None, [*rather, 'or ' + otherwise]))}"
            )


def memory_available() -> int | None:
    """MemAvailable of this machine in bytes, None where the system does not tell."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", text)
    return int(found.group(1)) * 1024 if found else None
