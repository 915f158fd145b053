"""A layer whose experts are worked on together, by several ranks.

What smooths experts together needs the weights and the statistics of all of them at once, so every rank has the whole
layer. Their statistics are made as in `shared_experts`, each expert's on one rank, and then given to all; what is done
with them is shared out like work on other Linears, and at the end each rank runs its batches through all experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .expert_groups import Given, Names, by_identity, projection
from .shared_experts import SharedExperts
from .statistics import Statistics

if TYPE_CHECKING:
    from .hooks import CacheRecorder
    from .layer import Layer, Visitor


@dataclass
class WholeExperts(SharedExperts):
    """Layer `run.index`, all of which is in memory."""

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
        visitor.prepare(whole)
        if first:
            seen = self._all_statistics(whole, first, all_experts)
            visitor.finish(whole, self.run.complete(whole, list(first), seen))
        if last or recorders or keep:
            ranges = self.run.statistics(whole, last, keep=keep, recorders=recorders)
            visitor.observe(whole, ranges, recorders)

    def _all_statistics(self, whole: Layer, first: Names, all_experts: bool) -> dict[str, Statistics]:
        outer = self._part(whole, None)
        self.entering = Given(self.run, self._path("experts-before"))
        seen = self._outer(self.entering, {name: first[name] for name in first if name in outer.linears}, None)
        for members in self._groups(whole, first):
            part = self._part(whole, members)
            wants = {name: first[name] for name in first if name in part.linears}
            seen |= self._everywhere(self._statistics(part, members, wants, all_experts))
        self.entering.remove()
        if all_experts:  # all of them read one input, of which each rank has seen all
            parts = self.run.skeleton.family.expert_parts[:2]
            entering = [name for name in first if name in seen and projection(name) in parts]
            seen |= dict.fromkeys(entering, seen[entering[0]]) if entering else {}
        return seen

    def _everywhere(self, mine: Mapping[str, Statistics]) -> dict[str, Statistics]:
        """What every rank's own experts have seen, on all."""
        ranks, own = self.run.ranks, []
        grams = []
        for group in by_identity(mine.items()):
            seen = group[0][1]
            own.append(([name for name, _ in group], seen.copy(gram=False), seen.gram is not None))
            grams += [] if seen.gram is None else [seen.gram]
        everyone = ranks.gather(own)
        incoming = [
            [torch.empty(len(seen.min), len(seen.min)) for _, seen, gram in theirs if gram and rank != ranks.rank]
            for rank, theirs in enumerate(everyone)
        ]
        ranks.exchange([grams if rank != ranks.rank else [] for rank in range(ranks.world)], incoming)
        found: dict[str, Statistics] = {}
        for rank, theirs in enumerate(everyone):
            arrived = iter(grams if rank == ranks.rank else incoming[rank])
            for names, seen, gram in theirs:
                seen.gram = next(arrived) if gram else None
                found.update(dict.fromkeys(names, seen))
        return found
