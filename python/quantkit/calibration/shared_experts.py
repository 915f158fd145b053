"""A layer whose experts are shared out over several ranks, by what they cost.

Each rank runs the other parts for its batches, as with `expert_groups`. Then experts go by rounds: an expert's tokens
are sent to the rank that has it, which runs them batch by batch, in the order of all batches, works on the expert by
itself, and sends back what it gives; there that is added up, experts always in the same order. So every number comes
out as in one process, and a rank reads and holds its own experts only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..distributed import ONE, Ranks
from ..errors import CalibrationError
from .expert_groups import ExpertGroups, Given, Names, by_identity, projection
from .hidden import BatchBuffer
from .hooks import BatchRows
from .statistics import Statistics
from .tree import Leaves, Part, across

if TYPE_CHECKING:
    from .layer import Layer

# What a rank receives for a round at most, in bytes.
ROUND_BYTES = 512 << 20
# A multiplication of fp32, in those of bf16: GPTQ works in fp32.
FP32 = 4.0


@dataclass
class SharedExperts(ExpertGroups):
    """`size`: experts that a rank has in memory at most."""

    def __post_init__(self) -> None:
        self._round, self._owner = range(0), dict[int, int]()
        self._names: dict[str, int] = {}  # of Linears, and their owners
        self._tables: dict[int, list[list[list[int]]]] = {}

    @property
    def shared(self) -> bool:
        return True

    @property
    def owners(self) -> Mapping[str, int]:
        return dict(self._names)

    def _table(self, given: Given) -> list[list[list[int]]]:
        """By rank and batch, how many tokens each expert gets."""
        if id(given) not in self._tables:
            self._tables[id(given)] = self.run.ranks.gather(given.table(len(self.experts)))
        return self._tables[id(given)]

    def _counts(self) -> list[int]:
        assert self.entering is not None
        return self._sums(self.entering)

    def _sums(self, given: Given) -> list[int]:
        found = [0] * len(self.experts)
        for theirs in self._table(given):
            for batch in theirs:
                for i, count in enumerate(batch):
                    found[i] += count
        return found

    def _groups(self, whole: Layer, first: Names) -> Iterator[Sequence[int]]:
        ranks, count = self.run.ranks, len(self.experts)
        costs, tokens = self._costs(whole, first)
        expert = next(iter(self.experts))
        width = max(linear.in_features for linear in expert.modules() if isinstance(linear, torch.nn.Linear))
        each = max(1, sum(tokens) // count) * width * self.run.skeleton.dtype.itemsize
        most = max(ranks.world, min(self.size * ranks.world, ROUND_BYTES * ranks.world // each))
        rounds = -(-count // most)
        for i in range(rounds):
            self._round = range(i * count // rounds, (i + 1) * count // rounds)
            self._owner = _owners(self._round, costs, ranks.world, -(-most // ranks.world))
            for e, owner in self._owner.items():
                self._names.update(dict.fromkeys(self._part(whole, [e]).linears, owner))
            yield [e for e in self._round if self._owner[e] == ranks.rank]

    def _costs(self, whole: Layer, first: Names) -> tuple[list[float], list[int]]:
        """What each expert costs, in multiplications of bf16, and the tokens it is given at most at once."""
        before, after = (
            self._sums(given) if given else [0] * len(self.experts) for given in (self.entering, self.leaving)
        )
        costs = []
        for e in range(len(self.experts)):
            cost = 0.0
            inputs: dict[int, float] = {}
            for name, linear in self._part(whole, [e]).linears.items():
                n, k = linear.out_features, linear.in_features
                cost += (before[e] + after[e]) * n * k
                if name in first and first[name].gram:
                    cost += FP32 * n * k * k / 2
                    inputs[k] = before[e] * k * k / 2 + FP32 * k**3 / 6  # gate and up have one
            costs.append(cost + sum(inputs.values()))
        return costs, [max(pair) for pair in zip(before, after, strict=True)]

    # Tokens there and back

    def _fetched(self, given: Given, members: Sequence[int]) -> list[list[Tensor]]:
        """By rank and batch, the rows that this rank's experts `members` are given, one expert's after the other's."""
        ranks, states, table = self.run.ranks, given.states(), self._table(given)
        outgoing: list[list[Tensor]] = [[] for _ in range(ranks.world)]
        for number in range(len(self.run.batches)):
            x, by_slot = states.view(number), given.routes(number)[0].t()
            tokens: list[list[Tensor]] = [[] for _ in range(ranks.world)]
            for e in self._round:
                if table[ranks.rank][number][e]:
                    tokens[self._owner[e]].append(torch.where(by_slot == e)[1])
            for rank, mine in enumerate(tokens):
                outgoing[rank].append(x[torch.cat(mine)] if mine else x[:0])
            states.rest(number)
        incoming = [
            [torch.empty(sum(batch[e] for e in members), states.width, dtype=states.dtype) for batch in theirs]
            for theirs in table
        ]
        ranks.exchange(outgoing, incoming)
        return incoming

    def _run_on(
        self,
        part: Layer,
        given: Given,
        members: Sequence[int],
        wants: Names,
        rows: list[list[Tensor]],
        *,
        results: bool,
    ) -> dict[str, Statistics]:
        """Experts on their `rows`, which become what they give if `results`; the statistics of their inputs."""
        hooks = self._hooks(wants, part.linears, Leaves(len(self.run.everything)))
        number = 0
        with hooks:
            for rank, theirs in enumerate(self._table(given)):
                for place, batch in enumerate(theirs):
                    hooks.begin(BatchRows(self.run.everything[number]), number)
                    number += 1
                    begin = 0
                    for e in members:
                        mine = rows[rank][place][begin : begin + batch[e]]
                        begin += batch[e]
                        if batch[e]:
                            # A copy, which lies in memory as it would alone.
                            found = self.experts[e](mine.clone(), self.experts.combine)
                            if results:
                                if found.dtype != mine.dtype:
                                    raise CalibrationError(
                                        f"{part.prefix}: experts take {mine.dtype} and give {found.dtype}; several "
                                        "processes cannot share them"
                                    )
                                mine.copy_(found)
        return hooks.statistics(ONE)

    def _statistics(
        self, part: Layer, members: Sequence[int], wants: Names, all_experts: bool
    ) -> dict[str, Statistics]:
        given = self.entering
        assert given is not None
        if all_experts:
            return self._on_everything(part, given, members, wants)
        return self._run_on(part, given, members, wants, self._fetched(given, members), results=False)

    def _on_everything(self, part: Layer, given: Given, members: Sequence[int], wants: Names) -> dict[str, Statistics]:
        """The statistics of experts that see all real tokens, which are sent to all ranks batch by batch."""
        ranks, states = self.run.ranks, given.states()
        hooks = self._hooks(wants, part.linears, Leaves(len(self.run.everything)))
        with hooks:
            for number, batch in enumerate(self.run.everything):
                rows = BatchRows(batch)
                hooks.begin(rows, number)
                owner = next(
                    r for r in range(ranks.world) if number in Leaves.of_rank(len(self.run.everything), ranks, r)
                )
                if owner == ranks.rank:
                    here = number - self.run.leaves.numbers.start
                    x = states.view(here)
                    everyone = x.clone() if rows.mask is None else x[rows.mask]
                    states.rest(here)
                else:
                    everyone = torch.empty(batch.tokens, states.width, dtype=states.dtype)
                nothing: list[list[Tensor]] = [[] for _ in range(ranks.world)]
                outgoing = [[everyone] if r != owner else [] for r in range(ranks.world)]
                incoming = [[everyone] if r == owner != ranks.rank else [] for r in range(ranks.world)]
                ranks.exchange(outgoing if owner == ranks.rank else nothing, incoming)
                for e in members:
                    self.experts[e](everyone, self.experts.combine)
        return hooks.statistics(ONE)

    def _outputs(
        self, part: Layer, members: Sequence[int], wants: Names, outputs: BatchBuffer
    ) -> dict[str, Statistics]:
        given, ranks = self.leaving, self.run.ranks
        assert given is not None
        rows = self._fetched(given, members)
        seen = self._run_on(part, given, members, wants, rows, results=True)
        table = self._table(given)[ranks.rank]
        of = [[e for e in self._round if self._owner[e] == rank] for rank in range(ranks.world)]
        back = [
            [torch.empty(sum(batch[e] for e in of[rank]), outputs.width, dtype=outputs.dtype) for batch in table]
            for rank in range(ranks.world)
        ]
        ranks.exchange(rows, back)
        for number in range(len(self.run.batches)):
            out, (index, weights) = outputs.view(number), given.routes(number)
            if self._round.start == 0:
                out.zero_()
            by_slot, begins = index.t(), [0] * ranks.world
            for e in self._round:
                count = table[number][e]
                if not count:
                    continue
                owner = self._owner[e]
                result = back[owner][number][begins[owner] : begins[owner] + count]
                begins[owner] += count
                slot, token = torch.where(by_slot == e)
                result = result * weights[token, slot, None]
                out.index_add_(0, token, result.to(out.dtype))
            outputs.rest(number)
        return seen

    def _pool(self, pools: dict[str, Statistics], seen: Sequence[tuple[str, Statistics]]) -> None:
        ranks = self.run.ranks
        found: dict[tuple[str, ...], list[Part]] = {}
        for e in self._round:
            mine = [(projection(name), s) for name, s in seen if f".experts.{e}." in name]
            for shared in by_identity(mine):
                found.setdefault(tuple(key for key, _ in shared), []).append(Part(e, shared[0][1]))
        for keys in sorted({keys for theirs in ranks.gather(list(found)) for keys in theirs}):
            parts = found.get(keys, [])
            if keys[0] in pools and ranks.first:
                parts = [Part(-1, pools[keys[0]]), *parts]
            pool = across(parts, ranks, _chain)
            if pool is not None:
                pools.update(dict.fromkeys(keys, pool))


def collected(mine: Mapping[str, Statistics], ranks: Ranks, *, on_all: bool = True) -> dict[str, Statistics]:
    """What every rank's own experts have seen, on all, or on the first one and nothing on the others."""
    own, grams = [], []
    for group in by_identity(mine.items()):
        seen = group[0][1]
        own.append(([name for name, _ in group], seen.copy(gram=False), seen.gram is not None))
        grams += [] if seen.gram is None else [seen.gram]
    everyone, receives = ranks.gather(own), on_all or ranks.first
    incoming = [
        [torch.empty(len(seen.min), len(seen.min)) for _, seen, gram in theirs if gram]
        if receives and rank != ranks.rank
        else []
        for rank, theirs in enumerate(everyone)
    ]
    to = [rank != ranks.rank and (on_all or rank == 0) for rank in range(ranks.world)]
    ranks.exchange([grams if wanted else [] for wanted in to], incoming)
    found: dict[str, Statistics] = {}
    for rank, theirs in enumerate(everyone if receives else ()):
        arrived = iter(grams if rank == ranks.rank else incoming[rank])
        for names, seen, gram in theirs:
            seen.gram = next(arrived) if gram else None
            found.update(dict.fromkeys(names, seen))
    return found


def _chain(parts: list[Part]) -> Statistics:
    """The sum of these in the order of their numbers."""
    first, *rest = sorted(parts, key=lambda part: part.leaf)
    for part in rest:
        first.sum.merge(part.sum)
    return first.sum


def _owners(experts: Sequence[int], costs: Sequence[float], ranks: int, most: int) -> dict[int, int]:
    """A rank for each expert, of which none has more than `most`: the dearest first to whoever has least to do."""
    loads, numbers, found = [0.0] * ranks, [0] * ranks, dict[int, int]()
    for e in sorted(experts, key=lambda e: (-costs[e], e)):
        rank = min((r for r in range(ranks) if numbers[r] < most), key=lambda r: loads[r])
        found[e] = rank
        loads[rank] += costs[e]
        numbers[rank] += 1
    return found
