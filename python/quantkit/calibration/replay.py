"""A sweep's visitor at work without a forward: a layer with its weights, and statistics from a file.

Every input is as the full-precision model has it, whatever has been quantized in front of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce

import torch

from ..checkpoint.native import kept_memory
from ..errors import CalibrationError
from ..models.skeleton import Skeleton, WeightSource
from ..report.progress import Progress
from .hooks import CacheRecorder
from .layer import Keeper, Layer, SweepReport, Visitor
from .statistics import Statistics, Wants
from .statistics_check import StatisticsFile

# Inputs are loaded so many bytes of Gram matrices at a time, or one that is larger, where they may come one by one.
PORTION = 512 << 20


def replay(
    skeleton: Skeleton,
    source: WeightSource,
    file: StatisticsFile,
    visitor: Visitor,
    *,
    together: bool = False,
    progress: Progress | None = None,
    keeper: Keeper | None = None,
) -> SweepReport:
    """Every layer by the statistics in `file`, which has what `visitor` wants. `together`: all inputs of a layer with
    experts at once. `keeper`: see there; layers have no hidden states here.
    """
    report = SweepReport(file.contents.tokens)
    names = [list(skeleton.linears(i)) for i in range(skeleton.num_layers)]
    known = {*visitor.statistics, *visitor.ranges}
    unknown = known.difference(*names)
    if unknown:
        raise CalibrationError(f"no Linear of {skeleton.folder} is named {', '.join(sorted(unknown)[:5])}")
    caches = [[c for c in visitor.caches if c.startswith(f"{skeleton.layer_prefix(i)}.")] for i in range(len(names))]
    needed = [i for i, here in enumerate(names) if caches[i] or known.intersection(here)]
    if progress is not None:
        progress.expect(len(needed))
    if keeper is not None:
        keeper.restore(None, report)
        done = [index for index in needed if index < keeper.begin]
        needed = needed[len(done) :]
        if progress is not None:
            progress.advance(len(done))
    with torch.no_grad(), kept_memory():
        for index in needed:
            skeleton.materialize(index, source)
            layer = Layer(index, skeleton.layer_prefix(index), skeleton.linears(index), skeleton.stored(index))
            visitor.prepare(layer)
            whole = (
                visitor.across(index) is not None
                or bool(visitor.norms(index))
                or (together and bool(skeleton.experts[index]))
            )
            for name in names[index]:
                if name in visitor.statistics and skeleton.family.is_expert(name):
                    report.expert_tokens[name] = file.inputs[name].count if name in file.inputs else 0
            for statistics in _portions(file, visitor, names[index], whole):
                first = {n: seen for n, seen in statistics.items() if n in visitor.statistics}
                if first:
                    visitor.finish(layer, first)
                visitor.observe(layer, {n: seen for n, seen in statistics.items() if n in visitor.ranges}, {})
            report.silent_experts += [n for n in names[index] if n in known and n not in file.inputs]
            recorders = {name: CacheRecorder(name) for name in caches[index]}
            for name, recorder in recorders.items():
                recorder.merge({part: largest[:, None] for part, largest in file.cache(name).items()})
            visitor.observe(layer, {}, recorders)
            skeleton.drop(index, source)
            if keeper is not None:
                keeper.layer_done(index, None, report)
            if progress is not None:
                progress.advance(1)
    return report


def _portions(
    file: StatisticsFile, visitor: Visitor, names: Sequence[str], whole: bool
) -> Iterator[dict[str, Statistics]]:
    """The statistics of a layer's Linears, in the model's order: all, or as much as a portion holds."""
    wanted = {
        name: visitor.statistics.get(name, Wants()) | visitor.ranges.get(name, Wants())
        for name in names
        if name in visitor.statistics or name in visitor.ranges
    }
    found: dict[str, Statistics] = {}
    held = 0
    for leader, readers in _inputs(file, wanted).items():
        wants = reduce(Wants.__or__, (wanted[name] for name in readers))
        size = 4 * file.inputs[leader].channels ** 2 if wants.gram else 0
        if found and not whole and held + size > PORTION:
            yield found
            found, held = {}, 0
        found.update(dict.fromkeys(readers, file.load(file.inputs[leader], wants)))
        held += size
    for loan in _loans(file, wanted, dict(found) if whole else {}):
        if found and not whole:
            yield found
            found = {}
        found.update(loan)
    if found:
        yield {name: found[name] for name in wanted if name in found}


def _inputs(file: StatisticsFile, names: Iterable[str]) -> dict[str, list[str]]:
    """Which of `names` read each distinct input, under the name of the first."""
    found: dict[str, list[str]] = {}
    leaders: dict[str, str] = {}
    for name in names:
        if name in file.inputs:
            leader = leaders.setdefault(file.inputs[name].name, name)
            found.setdefault(leader, []).append(name)
    return found


def _loans(
    file: StatisticsFile, wanted: Mapping[str, Wants], loaded: Mapping[str, Statistics]
) -> Iterator[dict[str, Statistics]]:
    """For each expert that no token reached what the layer's others saw: one object for its Linears that read one
    input. What is not `loaded` is read from the file once more.
    """
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name in wanted:
        if name not in file.inputs:
            experts, _, part = name.rpartition(".experts.")
            projection = part.partition(".")[2]
            others = [n for n in wanted if n.startswith(f"{experts}.experts.") and n.endswith(f".{projection}")]
            inputs = tuple(_inputs(file, others))
            if not experts or not inputs:
                raise CalibrationError(
                    f"{name}: no calibration token reached any of its layer's experts; use more calibration data"
                )
            leaders = tuple(file.inputs[n].name for n in inputs)
            groups.setdefault((name.rpartition(".")[0], leaders), []).append(name)
    merged: dict[tuple[str, ...], Statistics] = {}
    for (_, leaders), readers in groups.items():
        if leaders not in merged:
            wants = reduce(Wants.__or__, (wanted[name] for name in readers))
            entries = [file.contents.inputs[leader] for leader in leaders]
            known = {file.inputs[name].name: seen for name, seen in loaded.items()}
            first, *rest = entries
            total = known[first.name].copy() if first.name in known else file.load(first, wants)
            for entry in rest:
                total.merge(known[entry.name] if entry.name in known else file.load(entry, wants))
            total.count = 0
            merged[leaders] = total
        yield dict.fromkeys(readers, merged[leaders].copy())
