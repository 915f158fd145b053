"""One pass over the decoder layers that collects what the inputs of their Linears are like.

Per layer: load; let the visitor prepare (and quantize, if its codes do not depend on data); run every batch, and let
the visitor work on each distinct input once all batches are there (see `lockstep`); drop. Where that does not do, the
layer runs twice: with hooks that gather the statistics of all inputs, and, once the visitor has worked on them, again,
which makes the next layer's inputs with the weights it left and gathers the ranges of what will be served.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from ..checkpoint.native import host, kept_memory
from ..distributed import ONE, Ranks
from ..errors import CalibrationError
from ..models.skeleton import Skeleton, WeightSource
from ..report.progress import Progress
from .batches import Batch
from .expert_groups import ExpertGroups
from .forward import embedded
from .hooks import CacheRecorder
from .layer import Keeper, Layer, SweepReport, Visitor
from .layer_run import LayerRun
from .lockstep import PROBE_TOKENS
from .shared_experts import SharedExperts
from .tree import Leaves
from .whole_experts import WholeExperts


def sweep(
    skeleton: Skeleton,
    source: WeightSource,
    batches: Sequence[Batch],
    visitor: Visitor,
    *,
    progress: Progress | None = None,
    all_experts: bool = False,
    forwards: int | str = "auto",
    offload: Path | None = None,
    expert_group: int | None = None,
    keep_memory: bool = True,
    ranks: Ranks = ONE,
    keeper: Keeper | None = None,
) -> SweepReport:
    """Run the calibration `batches` through the model, layer by layer, and hand `visitor` what it wants. Layers behind
    the last one that it wants anything of are not run. `all_experts`: in the first forward experts see all tokens.
    `forwards` of a layer whose statistics are wanted: 2, 1 (CalibrationError where that does not do), or "auto".
    `offload`: a folder for the hidden states, which stay in memory without; `expert_group`: how many experts of a layer
    are in memory at once; `keep_memory`: see `kept_memory`. The results are the same. Of several `ranks` each runs its
    share of the batches, and all have the statistics of all. `keeper`: see there.

    CalibrationError for NaN or Inf names layer, module and batch. An expert that no token reached gets the merged
    statistics of its layer's other experts; it is in the report, and said aloud.
    """
    report = SweepReport(sum(batch.tokens for batch in batches))
    names = [list(skeleton.linears(i)) for i in range(skeleton.num_layers)]
    unknown = {*visitor.statistics, *visitor.ranges}.difference(*names)
    if unknown:
        raise CalibrationError(f"no Linear of {skeleton.folder} is named {', '.join(sorted(unknown)[:5])}")
    caches = [_within(visitor.caches, skeleton.layer_prefix(i)) for i in range(skeleton.num_layers)]
    needed = [
        i for i, n in enumerate(names) if caches[i] or any(m in visitor.statistics or m in visitor.ranges for m in n)
    ]
    if not needed:
        return report
    stop = needed[-1] + 1
    if progress is not None:
        progress.expect(stop)
    begin = 0 if keeper is None else min(keeper.begin, stop)
    if keeper is not None and begin == stop:
        keeper.restore(None, report)
    if progress is not None:
        progress.advance(begin)
    if begin == stop:
        return report
    with torch.no_grad(), kept_memory(keep_memory):
        # A few tokens find out what each layer does.
        probe = Batch(batches[0].input_ids[:1, :PROBE_TOKENS], None)
        leaves = Leaves.shared(len(batches), ranks)
        mine = [batches[i] for i in leaves.numbers]
        with skeleton.outer(source, head=False):
            probe_hidden, (probe_calls,) = embedded(skeleton, [probe])
            positions = [batch.input_ids.numel() for batch in batches]
            within = (sum(positions[: leaves.numbers.start]), sum(positions))
            hidden, calls = embedded(skeleton, mine, offload, within, keep=begin == 0)
        if keeper is not None and begin:
            keeper.restore(hidden, report)
        probe_view = probe_hidden.view(0)
        for index in range(begin, stop):
            routed = skeleton.experts[index]
            most = max(map(len, routed), default=0)
            size = min(most, expert_group or most)
            in_groups = bool(routed) and (size < most or ranks.world > 1)
            if in_groups and len(routed) > 1:
                raise CalibrationError(
                    f"{skeleton.layer_prefix(index)}: has {len(routed)} sets of experts, and only one set can come in "
                    "groups, or be shared by several processes; raise global.memory_budget, or leave low_memory and "
                    "torchrun out"
                )
            kind: type[ExpertGroups] = ExpertGroups if ranks.world == 1 else SharedExperts
            if visitor.together:
                in_groups, kind = in_groups and ranks.world > 1, WholeExperts
            if in_groups and kind is not WholeExperts:
                skeleton.materialize_without_experts(index, source)
            else:
                skeleton.materialize(index, source)
            if index + 1 < stop:
                skeleton.prefetch(index + 1, source, experts=expert_group)
            run = LayerRun(
                skeleton,
                index,
                batches,
                mine,
                within,
                leaves,
                ranks,
                calls,
                hidden,
                report,
                (probe_view, probe_calls[index]),
            )
            layer = Layer(
                index,
                skeleton.layer_prefix(index),
                skeleton.linears(index),
                skeleton.stored(index),
                run.outputs,
                None if in_groups and kind is not WholeExperts else run.probed,
                release=getattr(source, "release", lambda _: None),
            )
            if not in_groups:
                visitor.prepare(layer)
            first = {n: visitor.statistics[n] for n in names[index] if n in visitor.statistics}
            last = {n: visitor.ranges[n] for n in names[index] if n in visitor.ranges}
            feeds_on = index + 1 < stop
            recorders = {name: CacheRecorder(name, name in visitor.queries) for name in caches[index]}
            course = run.course(layer, visitor, [*first, *last], forwards) if first else None
            if in_groups:
                kind(run, source, routed[0], size, offload).visit(
                    layer, visitor, first, last, keep=feeds_on, all_experts=all_experts, recorders=recorders
                )
            elif course is not None:
                seen = run.lockstep(layer, course, visitor, first, last, keep=feeds_on, recorders=recorders)
                visitor.observe(layer, seen, recorders)
            else:
                if first:
                    visitor.finish(layer, run.statistics(layer, first, keep=False, all_experts=all_experts))
                if last or recorders or feeds_on:
                    seen = run.statistics(layer, last, keep=feeds_on, recorders=recorders)
                    visitor.observe(layer, seen, recorders)
            skeleton.drop(index, source)
            # Blocks of changing sizes leave gaps, which would grow with each layer.
            host().release_free_memory()
            if keeper is not None:
                keeper.layer_done(index, hidden if feeds_on else None, report)
            if progress is not None:
                progress.advance(1)
        hidden.remove()
    return report


def _within(modules: Collection[str], prefix: str) -> list[str]:
    return [module for module in modules if module.startswith(f"{prefix}.")]
