"""Linears back to full precision by measure: `compression.disable_level`, as Ascend's msModelSlim has it.

Ln leaves out the n Linears whose inputs have the longest tails: the largest magnitude over the standard deviation of
all values, in the first few samples. A static scale per tensor spends its codes on such a tail. Linears that read one
input stand or fall together, since servers fuse them, so that a few more than n may be left out.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from .calibration.layer import Onlooker
from .calibration.statistics import Statistics, Wants, tail
from .distributed import ONE, Ranks
from .errors import ConfigError
from .plan import Plan

if TYPE_CHECKING:
    from .calibration.hooks import CacheRecorder
    from .calibration.layer import Layer
    from .config.run_config import RunConfig

SAMPLES = 5


def count_of(level: str) -> int:
    """How many Linears "L3" leaves out."""
    found = re.fullmatch(r"L(0|[1-9]\d*)", level)
    if found is None:
        raise ConfigError(f"disable_level: '{level}'; write L0 (none), L1, L2, ...")
    return int(found[1])


def with_level(
    config: RunConfig, rows: Sequence[Sequence[int]] | None = None, *, progress: bool = True, ranks: Ranks = ONE
) -> RunConfig:
    """`config` with the Linears that its `disable_level` leaves out by name, and none left to find. Of several `ranks`
    the first measures: it is a few samples.
    """
    count = count_of(config.compression.disable_level)
    if count == 0:
        return config
    if config.calibration.statistics is not None:
        raise ConfigError(
            "compression.disable_level: runs the model, and calibration.statistics is there not to; drop one"
        )
    scores = ranks.broadcast(measure(config, rows, progress=progress) if ranks.first else None)
    chosen = worst(scores, count)
    told = ", ".join(f"{name} ({scores[name]:.0f})" for name in chosen)
    note = f"disable_level {config.compression.disable_level} keeps in full precision, by their inputs' tails: {told}"
    return replace(_without(config, chosen), notes=(*config.notes, note))


def measure(
    config: RunConfig, rows: Sequence[Sequence[int]] | None = None, *, progress: bool = True
) -> dict[str, float]:
    """The tail of the input of each Linear that `config` quantizes, or of those with static inputs if there are any;
    see `tail`.
    """
    from .calibration.batches import batches
    from .calibration.dataset import load_rows, load_tokenizer
    from .calibration.sweep import sweep
    from .engine import forward_dtype, open_plan
    from .formats.source import WeightSource
    from .models.skeleton import Skeleton
    from .report.progress import Progress

    with open_plan(_at_level_0(config)) as plan:
        names = _candidates(plan)
        remote, folder = config.model.trust_remote_code, plan.checkpoint.folder
        skeleton = Skeleton(folder, plan.checkpoint.parts, dtype=forward_dtype(config), trust_remote_code=remote)
        if rows is None:
            assert config.dataset is not None
            tokenizer = load_tokenizer(folder, trust_remote_code=remote)
            rows = load_rows(config.dataset, tokenizer, seed=config.global_.seed, vocab_size=skeleton.vocab_size)
        looked = _Tails(names)
        with Progress("disable_level", total=0, unit="layer", enabled=progress) as bar:
            sweep(skeleton, WeightSource(plan.checkpoint), batches(rows[:SAMPLES]), looked, progress=bar)
        sets = plan.family.fused_sets(names)
        for members in sets:
            largest = max(looked.found[name] for name in members)
            looked.found.update(dict.fromkeys(members, largest))
        return looked.found


def worst(scores: Mapping[str, float], count: int) -> tuple[str, ...]:
    """The `count` names with the highest scores, and those that have the same as the last of them."""
    if count >= len(scores):
        return tuple(scores)
    least = sorted(scores.values(), reverse=True)[count - 1]
    return tuple(name for name, score in scores.items() if score >= least)


class _Tails(Onlooker):
    """A sweep's visitor that changes nothing; see `calibration.layer.Visitor`."""

    def __init__(self, names: Collection[str]) -> None:
        self.statistics: dict[str, Wants] = {}
        self.ranges = {name: Wants(histogram=True) for name in names}
        self.caches: tuple[str, ...] = ()
        self.queries: tuple[str, ...] = ()
        self.found: dict[str, float] = {}

    def finish(self, layer: Layer, statistics: Mapping[str, Statistics]) -> None:
        """Nothing is asked for."""

    def observe(self, layer: Layer, ranges: Mapping[str, Statistics], caches: Mapping[str, CacheRecorder]) -> None:
        self.found |= {name: tail(seen) for name, seen in ranges.items()}


def _candidates(plan: Plan) -> list[str]:
    """Experts are left alone: they are quantized all together or not at all."""
    modules = {name: module for name, module in plan.modules.items() if not plan.family.is_expert(name)}
    static = [name for name, module in modules.items() if module.scheme.needs_calibration]
    return static or list(modules)


def _at_level_0(config: RunConfig) -> RunConfig:
    return replace(config, compression=replace(config.compression, disable_level="L0"))


def _without(config: RunConfig, names: Sequence[str]) -> RunConfig:
    """`config` at level 0 with these names in what it ignores."""
    compression = replace(config.compression, disable_level="L0")
    if compression.quantization is not None:
        ignored = (*compression.quantization.ignore_layers, *names)
        quantization = replace(compression.quantization, ignore_layers=ignored)
        return replace(config, compression=replace(compression, quantization=quantization))
    assert compression.recipe is not None
    modifiers = [
        replace(m, ignore=(*m.ignore, *names)) if m in compression.recipe.quantizers else m
        for m in compression.recipe.modifiers
    ]
    recipe = replace(compression.recipe, modifiers=tuple(modifiers))
    return replace(config, compression=replace(compression, recipe=recipe))
