"""One layer of a sweep: all batches through it, watched or not, and what was seen of the inputs of its Linears."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

from torch import Tensor
from tqdm import tqdm

from ..distributed import Ranks
from ..errors import CalibrationError
from ..estimate import HELD_BYTES
from ..models.attention import watched_queries
from ..models.skeleton import LayerCall, Skeleton
from .batches import Batch
from .expert_groups import projection
from .forward import faster, forward, tensors_in
from .hidden import HiddenStates
from .hooks import BatchRows, CacheRecorder, InputHooks
from .layer import Layer, SweepReport, Visitor
from .lockstep import Course, Lockstep, Unfit, explore
from .statistics import Statistics, Wants
from .tree import Leaves


@dataclass
class LayerRun:
    """A layer and what goes through it. `batches` of `everything` are this rank's, `within`: positions before these,
    and of all; `probe`: a few tokens' hidden states and call.
    """

    skeleton: Skeleton
    index: int
    everything: Sequence[Batch]
    batches: Sequence[Batch]
    within: tuple[int, int]
    leaves: Leaves
    ranks: Ranks
    calls: Sequence[Sequence[LayerCall]]
    hidden: HiddenStates
    report: SweepReport
    probe: tuple[Tensor, LayerCall]

    @property
    def positions(self) -> list[int]:
        """Of each of this rank's batches, padding among them."""
        return [batch.input_ids.numel() for batch in self.batches]

    def course(self, layer: Layer, visitor: Visitor, wanted: Sequence[str], forwards: int | str) -> Course | None:
        """How one forward would go about the layer; None, and why in the report, if it is to run twice."""
        found, why = None, ""
        try:
            found = self._course(layer, visitor, list(dict.fromkeys(wanted)), forwards)
        except Unfit as unfit:
            why = str(unfit)
        found, why = self.ranks.broadcast((found, why))
        if found is None and forwards == 1:
            raise CalibrationError(
                f"{layer.prefix}: one forward does not do: {why}. global.calibration_forwards: auto takes two there"
            )
        if found is None:
            self.report.twice[layer.prefix] = why
        else:
            self.report.once += 1
        return found

    def _course(self, layer: Layer, visitor: Visitor, wanted: Sequence[str], forwards: int | str) -> Course:
        if forwards == 2:
            raise Unfit("as global.calibration_forwards says")
        if self.skeleton.experts[self.index]:
            raise Unfit("which experts run depends on the data")
        if (why := visitor.across(self.index)) is not None:
            raise Unfit(why)
        view, call = self.probe
        known = [view, *tensors_in([call.args, call.kwargs])]
        course = explore(
            layer,
            wanted,
            visitor.norms(self.index),
            self.probed,
            view.shape[1],
            known,
        )
        held = course.bytes_per_position * sum(batch.input_ids.numel() for batch in self.everything)
        if forwards != 1 and held > HELD_BYTES:
            raise Unfit(f"{held / 1e9:.1f} GB would wait between its Linears, more than {HELD_BYTES / 1e9:.1f}")
        return course

    def lockstep(
        self,
        layer: Layer,
        course: Course,
        visitor: Visitor,
        first: Mapping[str, Wants],
        last: Mapping[str, Wants],
        *,
        keep: bool,
        recorders: Mapping[str, CacheRecorder],
    ) -> dict[str, Statistics]:
        """Every batch through the layer once, the visitor at work in between; the statistics for `last`."""
        cache = next(iter(recorders.values()), None)

        def forward(number: int) -> None:
            view = self.hidden.view(number)
            out = self.skeleton.forward(self.index, view, self.calls[number][self.index], cache)
            if keep:
                self.hidden.put(number, out)

        rows = [BatchRows(batch) for batch in self.batches]
        walks = Lockstep(layer, course, rows, forward, self.leaves, self.ranks, cache, self.hidden.rest)
        with faster(self.skeleton, self.index, self.everything), self._watched(recorders):
            found = walks.run(visitor, first, last, to_end=keep or cache is not None)
        if keep:
            self.hidden.turn()
        self._together(recorders)
        return found

    def statistics(
        self,
        layer: Layer,
        wants: Mapping[str, Wants],
        *,
        keep: bool,
        all_experts: bool = False,
        recorders: Mapping[str, CacheRecorder] | None = None,
    ) -> dict[str, Statistics]:
        """Every batch through the layer; the statistics of the inputs of the Linears in `wants`."""
        experts = self.skeleton.experts[self.index]
        linears = {name: layer.linears[name] for name in wants}
        hooks = InputHooks(linears, wants, experts, self.leaves) if wants else None
        for group in experts:
            group.all_tokens = all_experts
        self.forward(hooks, keep=keep, recorders=recorders)
        for group in experts:
            group.all_tokens = False
        return {} if hooks is None else self.complete(layer, list(wants), hooks.statistics(self.ranks))

    def forward(
        self, hooks: InputHooks | None, *, keep: bool, recorders: Mapping[str, CacheRecorder] | None = None
    ) -> None:
        """Every batch through the layer, watched by `hooks`."""
        cache = next(iter(recorders.values()), None) if recorders else None
        with hooks or nullcontext(), self._watched(recorders or {}):
            forward(
                self.skeleton,
                self.index,
                self.batches,
                self.calls,
                self.hidden,
                hooks,
                keep=keep,
                cache=cache,
                of=self.everything,
            )
        if recorders:
            self._together(recorders)

    @contextmanager
    def _watched(self, recorders: Mapping[str, CacheRecorder]) -> Iterator[None]:
        """Within the block, recorders that want queries are given them."""
        with ExitStack() as stack:
            for name, recorder in recorders.items():
                if recorder.wanted:
                    module = self.skeleton.module(self.index, name)
                    stack.enter_context(watched_queries(self.skeleton.model, module, recorder.see))
            yield

    def _together(self, recorders: Mapping[str, CacheRecorder]) -> None:
        """What the recorders of all ranks saw, in each."""
        for recorder in recorders.values():
            for kept in self.ranks.gather(recorder.kept):
                recorder.merge(kept)

    def outputs(self) -> Iterator[Tensor]:
        """The layer as it is, for each of this rank's batches; hidden states stay as they are."""
        for number, (batch, calls) in enumerate(zip(self.batches, self.calls, strict=True)):
            out = self.skeleton.forward(self.index, self.hidden.view(number), calls[self.index])
            yield out if batch.mask is None else out[batch.mask.bool()]
            self.hidden.rest(number)

    def probed(self) -> Tensor:
        """The layer as it is, for the few tokens of `probe`."""
        view, call = self.probe
        for experts in self.skeleton.experts[self.index]:
            experts.token_mask = None  # of a batch that ran before
        return self.skeleton.forward(self.index, view, call)

    def complete(
        self,
        layer: Layer,
        names: Sequence[str],
        statistics: Mapping[str, Statistics],
        pools: Mapping[str, Statistics] | None = None,
    ) -> dict[str, Statistics]:
        """Statistics of every wanted Linear; silent experts borrow from the layer's others, by the same projection, or
        from `pools`, where those are not there.
        """
        silent = [name for name in names if name not in statistics]
        statistics = {name: statistics[name] for name in names if name in statistics}
        loans: dict[str, Statistics] = {}
        borrowed: dict[tuple[object, ...], Statistics] = {}
        family = self.skeleton.family
        for name in names:
            if family.is_expert(name):
                self.report.expert_tokens[name] = statistics[name].count if name in statistics else 0
        for name in silent:
            if not family.is_expert(name):
                raise CalibrationError(f"{name}: the model's forward never calls this Linear, so its input is unknown")
            # Its own copy, which smoothing may change; its Linears that read one input share it as the others' do.
            pool = pools.get(projection(name)) if pools is not None else None
            others = _others(name, statistics) if pools is None else [pool]
            key = (name.rpartition(".")[0], *map(id, others))
            if key not in borrowed:
                borrowed[key] = merged_experts(name, statistics) if pools is None else _copied(name, pool)
                borrowed[key].count = 0
            loans[name] = borrowed[key]
        statistics.update(loans)
        new = [name for name in silent if name not in self.report.silent_experts]
        self.report.silent_experts.extend(new)
        if new and (self.ranks.first or layer.owners):  # where experts are shared out, each rank tells of its own
            numbers = sorted({int(name.rpartition(".experts.")[2].partition(".")[0]) for name in new})
            tqdm.write(
                f"warning: {layer.prefix}: no calibration token reached expert{'s' if len(numbers) > 1 else ''} "
                f"{', '.join(map(str, numbers))}; the statistics of the layer's other experts are used instead. "
                "More or more varied calibration data avoids this",
                file=sys.stderr,
            )
        return {name: statistics[name] for name in names}


def merged_experts(name: str, statistics: Mapping[str, Statistics]) -> Statistics:
    """What all experts of `name`'s layer saw at the same projection, together."""
    found = _others(name, statistics)
    merged = _copied(name, found[0] if found else None)
    for other in found[1:]:
        merged.merge(other)
    return merged


def _copied(name: str, seen: Statistics | None) -> Statistics:
    if seen is None:
        raise CalibrationError(
            f"{name}: no calibration token reached any of its layer's experts; use more calibration data"
        )
    return seen.copy()


def _others(name: str, statistics: Mapping[str, Statistics]) -> list[Statistics]:
    """The distinct statistics of the same projection of all experts that saw anything."""
    experts, _, part = name.rpartition(".experts.")
    projection = part.partition(".")[2]
    found: dict[int, Statistics] = {}
    for other, seen in statistics.items():
        if other.startswith(f"{experts}.experts.") and other.endswith(f".{projection}") and seen.count:
            found.setdefault(id(seen), seen)
    return list(found.values())
