"""A layer whose experts are worked on together, by several ranks.

What smooths experts together needs the weights and the statistics of all of them at once, so every rank has the whole
layer. Their statistics are made as in `shared_experts`, each expert's on one rank, and then given to all; what is done
with them is shared out like work on other Linears, and at the end each rank runs its batches through all experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .expert_groups import Given, Names, projection
from .shared_experts import SharedExperts, collected
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
            seen |= collected(self._statistics(part, members, wants, all_experts), self.run.ranks)
        self.entering.remove()
        if all_experts:  # all of them read one input, of which each rank has seen all
            parts = self.run.skeleton.family.expert_parts[:2]
            entering = [name for name in first if name in seen and projection(name) in parts]
            seen |= dict.fromkeys(entering, seen[entering[0]]) if entering else {}
        return seen
