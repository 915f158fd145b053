"""One pass over the decoder layers that collects what the inputs of their Linears are like.

Per layer: load; let the visitor prepare (and quantize, if its codes do not depend on data); run every batch, and let
the visitor work on each distinct input once all batches are there (see `lockstep`); drop. Where that does not do, the
layer runs twice: with hooks that gather the statistics of all inputs, and, once the visitor has worked on them, again,
which makes the next layer's inputs with the weights it left and gathers the ranges of what will be served.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..checkpoint.native import Trimmer, kept_memory
from ..distributed import ONE, Ranks
from ..errors import CalibrationError, DistributedError
from ..estimate import HELD_BYTES
from ..models.fused_block import fused_blocks
from ..models.fused_norm import fused
from ..models.packed_linear import packed
from ..models.skeleton import LayerCall, Skeleton, WeightSource
from ..report.progress import Progress
from .batches import Batch
from .expert_groups import ExpertGroups, projection
from .hidden import HiddenStates
from .hooks import BatchRows, CacheRecorder, InputHooks, SeenAll
from .lockstep import PROBE_TOKENS, Course, Lockstep, Unfit, explore
from .shared_experts import SharedExperts
from .statistics import Statistics, Wants
from .tree import Leaves


@dataclass(frozen=True)
class Layer:
    """A decoder layer with its weights in memory. `linears` holds its Linears by their checkpoint names, `stored` every
    parameter and buffer by its name: (module, attribute). `outputs` runs the layer as it is on each batch. Where
    experts come in groups, each group is a Layer and all else is one; `pools`: what all experts saw, by projection;
    `owners`: which rank alone works on a Linear, where several share out the experts. `release(name)`: the source's own
    of a parameter that has been replaced need not stay resident.
    """

    index: int
    prefix: str
    linears: Mapping[str, nn.Linear]
    stored: Mapping[str, tuple[nn.Module, str]]
    outputs: Callable[[], Iterator[Tensor]] | None = None
    pools: Mapping[str, Statistics] = field(default_factory=dict)
    owners: Mapping[str, int] = field(default_factory=dict)
    release: Callable[[str], None] = lambda _: None

    def tensor(self, name: str) -> Tensor:
        """The parameter or buffer with this checkpoint name."""
        module, key = self.stored[name]
        found: Tensor = getattr(module, key)
        return found.data

    def put(self, name: str, value: Tensor) -> None:
        """Replace a parameter by `value`."""
        module, key = self.stored[name]
        setattr(module, key, nn.Parameter(value, requires_grad=False))


class Visitor(Protocol):
    """What is done to each layer. `statistics`: which Linears' inputs are wanted to work with, `ranges`: which of them
    as they will be served; `caches`: attention modules whose keys and values are looked at as they will be.
    """

    @property
    def statistics(self) -> Mapping[str, Wants]: ...
    @property
    def ranges(self) -> Mapping[str, Wants]: ...
    @property
    def caches(self) -> Collection[str]: ...
    @property
    def pools_below(self) -> int:
        """An expert that saw fewer tokens is worked on with what all of its layer's experts saw."""
        ...

    def across(self, index: int) -> str | None:
        """Why the inputs of layer `index` have to be worked on together; None if one at a time will do."""
        ...

    def norms(self, index: int) -> Mapping[str, Collection[str]]:
        """Norms of the layer that `finish` divides together with an input, each with that input's readers."""
        ...

    def prepare(self, layer: Layer) -> None:
        """Before any forward. May put other weights into the layer."""
        ...

    def finish(self, layer: Layer, statistics: Mapping[str, Statistics]) -> None:
        """With the statistics of the inputs of some Linears, all that read them among these: of one input after the
        other, or of all the layer's at once. Linears that read the same tensor have the very same object. May put other
        weights into the layer, and divide an input (`Statistics.divide`) whose norm it divides.
        """
        ...

    def observe(self, layer: Layer, ranges: Mapping[str, Statistics], caches: Mapping[str, CacheRecorder]) -> None:
        """After the last forward."""
        ...


class Keeper(Protocol):
    """Lets a sweep go on in a later process. `begin`: the layer it starts with; those before it are done."""

    @property
    def begin(self) -> int: ...

    def restore(self, hidden: HiddenStates | None, report: SweepReport) -> None:
        """Put what enters layer `begin` into `hidden` (None if no layer is left), and what the layers before it told
        into `report`.
        """
        ...

    def layer_done(self, index: int, hidden: HiddenStates | None, report: SweepReport) -> None:
        """The visitor is done with layer `index`, and `hidden` is what enters the next one (None behind the last)."""
        ...


@dataclass
class SweepReport:
    """What a sweep saw: tokens, tokens per Linear of an expert, and those whose input was borrowed since none came;
    how many layers one forward served, and why each other one took two.
    """

    tokens: int
    expert_tokens: dict[str, int] = field(default_factory=dict)
    silent_experts: list[str] = field(default_factory=list)
    once: int = 0
    twice: dict[str, str] = field(default_factory=dict)


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
        probe_view, trimmer = probe_hidden.view(0), Trimmer()
        for index in range(begin, stop):
            routed = skeleton.experts[index]
            most = max(map(len, routed), default=0)
            size = min(most, expert_group or most)
            in_groups = bool(routed) and (size < most or ranks.world > 1)
            smoothed = [name for readers in visitor.norms(index).values() for name in readers]
            if ranks.world > 1 and any(map(skeleton.family.is_expert, smoothed)):
                raise DistributedError(
                    f"{skeleton.layer_prefix(index)}: its experts are smoothed together, which several processes "
                    "cannot share; start quantkit without torchrun"
                )
            if in_groups and len(routed) > 1:
                raise CalibrationError(
                    f"{skeleton.layer_prefix(index)}: has {len(routed)} sets of experts, and only one set can come in "
                    "groups, or be shared by several processes; raise global.memory_budget, or leave low_memory and "
                    "torchrun out"
                )
            if in_groups:
                skeleton.materialize_without_experts(index, source)
            else:
                skeleton.materialize(index, source)
            if index + 1 < stop:
                skeleton.prefetch(index + 1, source, experts=expert_group)
            run = _Run(
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
                release=getattr(source, "release", lambda _: None),
            )
            if not in_groups:
                visitor.prepare(layer)
            first = {n: visitor.statistics[n] for n in names[index] if n in visitor.statistics}
            last = {n: visitor.ranges[n] for n in names[index] if n in visitor.ranges}
            feeds_on = index + 1 < stop
            recorders = {name: CacheRecorder(name) for name in caches[index]}
            course = run.course(layer, visitor, [*first, *last], forwards) if first else None
            if in_groups:
                groups = ExpertGroups if ranks.world == 1 else SharedExperts
                groups(run, source, routed[0], size, offload).visit(
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
            trimmer.layer_done()
            if keeper is not None:
                keeper.layer_done(index, hidden if feeds_on else None, report)
            if progress is not None:
                progress.advance(1)
        hidden.remove()
    return report


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Those in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(entry)


def _within(modules: Collection[str], prefix: str) -> list[str]:
    return [module for module in modules if module.startswith(f"{prefix}.")]


@dataclass
class _Run:
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
            lambda: self.skeleton.forward(self.index, view, call),
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
        with faster(self.skeleton, self.index, self.everything):
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
        with hooks or nullcontext():
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

    def _together(self, recorders: Mapping[str, CacheRecorder]) -> None:
        """What the recorders of all ranks saw, in each."""
        for recorder in recorders.values():
            for key, value in self.ranks.gather((recorder.key, recorder.value)):
                recorder.merge(key, value)

    def outputs(self) -> Iterator[Tensor]:
        """The layer as it is, for each of this rank's batches; hidden states stay as they are."""
        for number, (batch, calls) in enumerate(zip(self.batches, self.calls, strict=True)):
            out = self.skeleton.forward(self.index, self.hidden.view(number), calls[self.index])
            yield out if batch.mask is None else out[batch.mask.bool()]
            self.hidden.rest(number)

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
        if new:
            self.report.silent_experts.extend(new)
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


def embed(
    skeleton: Skeleton, source: WeightSource, batches: Sequence[Batch]
) -> tuple[HiddenStates, list[list[LayerCall]]]:
    """What enters the first layer, and every batch's calls of the layers, shared by unpadded batches of one shape."""
    with skeleton.outer(source, head=False):
        return embedded(skeleton, batches)


def embedded(
    skeleton: Skeleton,
    batches: Sequence[Batch],
    folder: Path | None = None,
    within: tuple[int, int] | None = None,
    *,
    keep: bool = True,
) -> tuple[HiddenStates, list[list[LayerCall]]]:
    """As `embed`, within `skeleton.outer`; `folder` and `within` are those of HiddenStates. Without `keep` its files
    are left as they are, for `HiddenStates.load`.
    """
    hidden = HiddenStates(batches, skeleton.hidden_size, skeleton.dtype, folder=folder, within=within)
    seen: dict[tuple[int, ...], list[LayerCall]] = {}
    calls: list[list[LayerCall]] = []
    for number, batch in enumerate(batches):
        bad = batch.input_ids.max() >= skeleton.vocab_size or batch.input_ids.min() < 0
        if bool(bad):
            raise CalibrationError(
                f"calibration data: token id {int(batch.input_ids.max())} is beyond the model's vocabulary of "
                f"{skeleton.vocab_size}; the tokenizer does not belong to this model"
            )
        entering, layer_calls = skeleton.capture(batch.input_ids, batch.mask)
        if keep:
            hidden.put(number, entering)
        if batch.mask is None:
            layer_calls = seen.setdefault(tuple(batch.input_ids.shape), layer_calls)
        calls.append(layer_calls)
    if keep:
        hidden.turn()
    return hidden, calls


@contextmanager
def faster(skeleton: Skeleton, index: int, batches: Sequence[Batch]) -> Iterator[None]:
    """Within the block, layer `index` runs `batches` by the fastest means."""
    dense = [m for n, m in skeleton.linears(index).items() if not skeleton.family.is_expert(n)]
    # Packing a weight costs about what it saves in one call.
    layer = skeleton.layers[index]
    with packed(dense if len(batches) > 2 else [], batches[0].input_ids.numel()), fused(layer), fused_blocks(layer):
        yield


def forward(
    skeleton: Skeleton,
    index: int,
    batches: Sequence[Batch],
    calls: Sequence[Sequence[LayerCall]],
    hidden: HiddenStates,
    hooks: InputHooks | None = None,
    *,
    keep: bool = True,
    cache: CacheRecorder | None = None,
    of: Sequence[Batch] | None = None,
) -> None:
    """Every batch through layer `index`; outputs replace the inputs if `keep`. If nobody needs outputs, a batch ends
    as soon as `hooks` have seen every input. `batches` may be some `of` all, by which it is decided how they run.
    """
    with faster(skeleton, index, of or batches):
        for number, batch in enumerate(batches):
            rows = BatchRows(batch)
            for experts in skeleton.experts[index]:
                experts.token_mask = rows.mask
            if hooks is not None:
                hooks.begin(rows, number)
            if cache is not None:
                cache.mask = None if batch.mask is None else batch.mask.bool()
            try:
                out = skeleton.forward(index, hidden.view(number), calls[number][index], cache)
            except SeenAll:
                continue
            finally:
                hidden.rest(number)
            if keep:
                hidden.put(number, out)
            elif hooks is not None and cache is None:
                hooks.may_stop()
    if keep:
        hidden.turn()
