"""A layer whose experts come and go in groups, for layers that are larger than memory.

The layer's other parts run first, for all batches; what the experts are given (inputs and routes) is kept. Then each
group is loaded, its inputs are looked at, the visitor works on it, and what it gives is added to the outputs, experts
always in the same order; then it goes. In the end the other parts run once more, with those outputs. Every number comes
out as if all experts had been there at once, whatever the groups' size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..models.experts import Experts
from ..models.skeleton import WeightSource
from .hidden import BatchBuffer
from .hooks import BatchRows, CacheRecorder, InputHooks
from .statistics import Statistics, Wants
from .tree import Leaves

if TYPE_CHECKING:
    from .layer import Layer, Visitor
    from .layer_run import LayerRun

Names = Mapping[str, Wants]


class Given:
    """What the experts are given: hidden states and, for each token, its experts and their weights."""

    def __init__(self, run: LayerRun, path: Path | None) -> None:
        self._sizes, self._path, self._within = run.positions, path, run.within
        self._empty = (run.skeleton.hidden_size, run.skeleton.dtype)
        self._states: BatchBuffer | None = None
        self._routes: list[tuple[Tensor, Tensor]] = []

    def put(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> None:
        """Those of the next batch."""
        if self._states is None:
            self._states = BatchBuffer(
                self._sizes, hidden_states.shape[1], hidden_states.dtype, self._path, self._within
            )
        number = len(self._routes)
        if number == len(self._sizes) or len(hidden_states) != self._sizes[number]:
            raise CalibrationError("the experts are not called once for each batch, so they cannot come in groups")
        self._states.put(number, hidden_states)
        # Of int64 nothing is needed but whether they are equal.
        self._routes.append((top_k_index.to(torch.int32), top_k_weights.clone()))

    def states(self) -> BatchBuffer:
        """[tokens, hidden] of every batch."""
        if self._states is None and not self._sizes:
            self._states = BatchBuffer((), *self._empty)
        if self._states is None or len(self._routes) != len(self._sizes):
            raise CalibrationError("the experts are not called once for each batch, so they cannot come in groups")
        return self._states

    def routes(self, number: int) -> tuple[Tensor, Tensor]:
        """top_k_index and top_k_weights [tokens, k] of a batch."""
        index, weights = self._routes[number]
        return index.to(torch.int64), weights

    def counts(self, experts: int) -> list[int]:
        """How many real tokens each expert gets."""
        return [sum(counts) for counts in zip(*self.table(experts), strict=True)] or [0] * experts

    def table(self, experts: int) -> list[list[int]]:
        """For each batch how many real tokens each expert gets."""
        counts = (torch.bincount(index.flatten(), minlength=experts + 1) for index, _ in self._routes)
        return [found[:experts].tolist() for found in counts]

    def remove(self) -> None:
        if self._states is not None:
            self._states.remove()


@dataclass
class ExpertGroups:
    """Layer `run.index` with at most `size` experts in memory. `folder`: where what waits lies; None: in memory."""

    run: LayerRun
    source: WeightSource
    experts: Experts
    size: int
    folder: Path | None

    entering: Given | None = None
    leaving: Given | None = None

    def visit(
        self,
        whole: Layer,
        visitor: Visitor,
        first: Names,
        last: Names,
        *,
        keep: bool,
        all_experts: bool,
        recorders: Mapping[str, CacheRecorder],
    ) -> None:
        """Everything that is done to the layer `whole`, whose experts are not there; see `sweep`."""
        outer = self._part(whole, None)
        visitor.prepare(outer)
        outputs = None
        pools: dict[str, Statistics] = {}
        if first:
            self.entering = Given(self.run, self._path("experts-before"))
            seen = self._outer(self.entering, _of(first, outer), None)
            if _of(first, outer):
                visitor.finish(outer, self.run.complete(outer, list(_of(first, outer)), seen))
            if not all_experts:
                pools = self._pools(whole, visitor, first)
        ranges: dict[str, Statistics] = {}
        if last or recorders or keep:
            self.leaving = Given(self.run, self._path("experts-after"))
            ranges |= self._outer(self.leaving, _of(last, outer), recorders)
            states = self.leaving.states()
            outputs = BatchBuffer(
                self.run.positions, states.width, states.dtype, self._path("experts-outputs"), self.run.within
            )
        inner: dict[str, Statistics] = {}
        for members in self._groups(whole, first):
            with self._loaded(whole, members, pools) as part:
                visitor.prepare(part)
                if first and (_of(first, part) or self.shared):
                    seen = self._statistics(part, members, _of(first, part), all_experts)
                    visitor.finish(part, self.run.complete(part, list(_of(first, part)), seen, pools))
                if outputs is not None:
                    inner |= self._outputs(part, members, _of(last, part), outputs)
        if keep and outputs is not None:
            self._forward(iter(self._taken(outputs)).__next__, keep=True)
        for buffer in (self.entering, self.leaving, outputs):
            if buffer is not None:
                buffer.remove()
        if last or recorders or keep:
            for theirs in self.run.ranks.gather(inner):
                ranges |= theirs
            outer = replace(outer, owners=self.owners)
            visitor.observe(outer, self.run.complete(whole, list(last), ranges), recorders)

    @property
    def shared(self) -> bool:
        """Whether the experts are shared out over several ranks."""
        return False

    @property
    def owners(self) -> Mapping[str, int]:
        """Which rank has a Linear of the experts, where they are shared out."""
        return {}

    def _path(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / name

    def _groups(self, whole: Layer, first: Names) -> Iterator[Sequence[int]]:
        """Those in memory at once, of this rank. The next one is read from disk while one is worked on."""
        count = len(self.experts)
        for begin in range(0, count, self.size):
            following = range(begin + self.size, min(begin + 2 * self.size, count))
            self.run.skeleton.prefetch_experts(self.experts, following, self.source)
            yield range(begin, min(begin + self.size, count))

    def _part(self, whole: Layer, members: Collection[int] | None) -> Layer:
        """What of the layer is there: some experts, or all else."""
        prefix = f"{self.run.skeleton.checkpoint_name(self.experts.path)}."

        def within(name: str) -> bool:
            number = name[len(prefix) :].partition(".")[0] if name.startswith(prefix) else ""
            return int(number) in members if number and members is not None else not number and members is None

        return replace(
            whole,
            linears={name: linear for name, linear in whole.linears.items() if within(name)},
            stored={name: place for name, place in whole.stored.items() if within(name)},
            outputs=None,
        )

    def _loaded(self, whole: Layer, members: Sequence[int], pools: Mapping[str, Statistics]) -> _Loaded:
        return _Loaded(self, replace(self._part(whole, members), pools=pools, owners=self.owners), members)

    # Other parts

    def _forward(self, stand_in: Callable[[], Tensor], *, keep: bool) -> None:
        self.experts.stand_in = lambda *_: stand_in()
        try:
            self.run.forward(None, keep=keep)
        finally:
            self.experts.stand_in = None

    def _outer(
        self, given: Given, wants: Names, recorders: Mapping[str, CacheRecorder] | None
    ) -> dict[str, Statistics]:
        """Every batch through the other parts; what the experts are given goes to `given`. What they would give is NaN,
        which no input that is looked at may depend on: statistics refuse it.
        """

        def stand_in(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            given.put(hidden_states, top_k_index, top_k_weights)
            return torch.full_like(hidden_states, torch.nan)

        self.experts.stand_in = stand_in
        hooks = self._hooks(wants, self.run.skeleton.linears(self.run.index)) if wants else None
        try:
            self.run.forward(hooks, keep=False, recorders=recorders)
        finally:
            self.experts.stand_in = None
        return {} if hooks is None else hooks.statistics(self.run.ranks)

    def _hooks(self, wants: Names, linears: Mapping[str, nn.Linear], leaves: Leaves | None = None) -> InputHooks:
        mine = {name: linears[name] for name in wants}
        return InputHooks(mine, wants, [self.experts], leaves or self.run.leaves)

    @staticmethod
    def _taken(outputs: BatchBuffer) -> Iterator[Tensor]:
        for number in range(len(outputs)):
            # A copy: the layer may add to it in place.
            yield outputs.view(number).clone()
            outputs.rest(number)

    # Experts

    def _statistics(
        self, part: Layer, members: Sequence[int], wants: Names, all_experts: bool
    ) -> dict[str, Statistics]:
        """Those experts on what they are given at first, or on all real tokens."""
        given = self.entering
        assert given is not None
        hooks, states = self._hooks(wants, part.linears), given.states()
        with hooks:
            for number, batch in enumerate(self.run.batches):
                rows = BatchRows(batch)
                hooks.begin(rows, number)
                x = states.view(number)
                if all_experts:
                    everyone = x if rows.mask is None else x[rows.mask]
                    for i in members:
                        self.experts[i](everyone, self.experts.combine)
                else:
                    self.experts.add(torch.zeros_like(x), x, *given.routes(number), members)
                states.rest(number)
        return hooks.statistics(self.run.ranks)

    def _outputs(
        self, part: Layer, members: Sequence[int], wants: Names, outputs: BatchBuffer
    ) -> dict[str, Statistics]:
        """What those experts give is added to `outputs`; the statistics of what they are given for that."""
        given = self.leaving
        assert given is not None
        hooks, states = self._hooks(wants, part.linears), given.states()
        with hooks:
            for number, batch in enumerate(self.run.batches):
                hooks.begin(BatchRows(batch), number)
                x, out = states.view(number), outputs.view(number)
                if members[0] == 0:
                    out.zero_()
                self.experts.add(out, x, *given.routes(number), members)
                states.rest(number)
                outputs.rest(number)
        return hooks.statistics(self.run.ranks)

    def _pools(self, whole: Layer, visitor: Visitor, first: Names) -> dict[str, Statistics]:
        """By projection what all experts see together, if one of them needs that: a round of its own, since it has to
        be there before the first of them is worked on.
        """
        wanted = [i for i in range(len(self.experts)) if _of(first, self._part(whole, [i]))]
        counts = self._counts()
        if all(counts[i] > 0 and counts[i] >= visitor.pools_below for i in wanted):
            return {}
        pools: dict[str, Statistics] = {}
        for members in self._groups(whole, first):
            with self._loaded(whole, members, {}) as part:
                wants = _of(first, part)
                seen = self._statistics(part, members, wants, False) if wants or self.shared else {}
                self._pool(pools, [(name, seen[name]) for name in wants if name in seen])
        return pools

    def _counts(self) -> list[int]:
        """How many real tokens each expert is given at first."""
        assert self.entering is not None
        return self.entering.counts(len(self.experts))

    def _pool(self, pools: dict[str, Statistics], seen: Sequence[tuple[str, Statistics]]) -> None:
        """Add what some experts saw, in their order."""
        for shared in by_identity([(projection(name), statistics) for name, statistics in seen]):
            pool = pools.get(shared[0][0])
            if pool is None:
                pools.update(dict.fromkeys((key for key, _ in shared), shared[0][1]))
            else:
                pool.merge(shared[0][1])


class _Loaded:
    """Some experts, in memory within the block."""

    def __init__(self, groups: ExpertGroups, part: Layer, members: Sequence[int]) -> None:
        self.groups, self.part, self.members = groups, part, members

    def __enter__(self) -> Layer:
        groups = self.groups
        groups.run.skeleton.materialize_experts(groups.experts, self.members, groups.source)
        return self.part

    def __exit__(self, *_: object) -> None:
        groups = self.groups
        groups.run.skeleton.drop_experts(groups.experts, self.members, groups.source)


def projection(name: str) -> str:
    """`up_proj` of `model.layers.3.mlp.experts.17.up_proj`."""
    return name.rpartition(".experts.")[2].partition(".")[2]


def _of(wants: Names, part: Layer) -> dict[str, Wants]:
    return {name: want for name, want in wants.items() if name in part.linears}


def by_identity(found: Iterable[tuple[str, Statistics]]) -> list[list[tuple[str, Statistics]]]:
    """Those of one object together, in the order of the first of each."""
    groups: dict[int, list[tuple[str, Statistics]]] = {}
    for key, seen in found:
        groups.setdefault(id(seen), []).append((key, seen))
    return list(groups.values())
