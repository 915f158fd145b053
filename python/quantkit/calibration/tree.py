"""Sums over batches in an order that does not depend on who adds: floating-point sums of other orders differ.

Batches in a row make a leaf, a few leaves a group. A leaf adds up its batches, a group its leaves and the whole its
groups, each from left to right. Whoever works on some leaves in a row can do all additions that lie within these, and
whoever has the results of all does the rest; the additions are the same, however the leaves are shared out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..distributed import Ranks
from .statistics import Statistics, Wants

# One process holds three sums of an input at most, whatever these are. Sixteen leaves share out well over up to eight
# processes, and adding up a leaf costs little against its tokens.
LEAVES, GROUP = 16, 4


@dataclass(frozen=True)
class Leaves:
    """`batches` in a row, cut into leaves, of which `share` (first, behind the last) are worked on here."""

    batches: int
    share: tuple[int, int] = (0, LEAVES)

    @classmethod
    def shared(cls, batches: int, ranks: Ranks) -> Leaves:
        """Those of this rank."""
        return cls(batches, ranks.share(cls(batches).count))

    @classmethod
    def of_rank(cls, batches: int, ranks: Ranks, rank: int) -> range:
        """The batches of a rank."""
        return cls(batches, ranks.share(cls(batches).count, rank)).numbers

    @property
    def numbers(self) -> range:
        """The batches that are worked on here."""
        first, end = (-(-leaf * self.batches // self.count) for leaf in self.share)
        return range(first, min(end, self.batches))

    @property
    def count(self) -> int:
        """How many leaves there are."""
        return min(LEAVES, self.batches)

    def of(self, batch: int) -> int:
        """The leaf of a batch."""
        return batch * self.count // self.batches


@dataclass
class Part:
    """The sum of some leaves: of leaf `leaf` alone, or of all from the start of its group on; with `whole`, of
    everything up to the end of its group.
    """

    leaf: int
    sum: Statistics
    whole: bool = False


class Sums:
    """The statistics of one input over the batches of `leaves.share`, which come in order."""

    def __init__(self, leaves: Leaves, wants: Wants) -> None:
        self._leaves, self._wants = leaves, wants
        self._parts: list[Part] = []
        self._leaf: Part | None = None

    def update(self, batch: int, x: Tensor, where: str | Callable[[], str]) -> None:
        """Take in x [tokens, channels] of `batch`; see `Statistics.update`."""
        leaf = self._leaves.of(batch)
        if self._leaf is None or self._leaf.leaf != leaf:
            self._close(leaf)
            self._leaf = Part(leaf, Statistics.empty(x.shape[1], self._wants))
        self._leaf.sum.update(x, where)

    def parts(self) -> list[Part]:
        """The sums so far, in order; nothing more may come."""
        self._close(self._leaves.share[1])
        return self._parts

    def _close(self, following: int) -> None:
        """The leaf at work is done, and `following` is the next one."""
        done, self._leaf = self._leaf, None
        if done is None:
            return
        first, _ = self._leaves.share
        mine = done.leaf // GROUP
        before = self._parts[-1] if self._parts else None
        if mine * GROUP >= first and before is not None and before.leaf // GROUP == mine and not before.whole:
            before.sum.merge(done.sum)
        else:
            self._parts.append(done)
        if first == 0 and following >= min((mine + 1) * GROUP, self._leaves.count):
            self._parts = [_whole(self._parts)]


def total(parts: list[Part], ranks: Ranks) -> Statistics | None:
    """The sum of everything from the parts of all ranks, the same on each; None if there are none. Changes `parts`."""
    return across(parts, ranks, joined)


def across(parts: list[Part], ranks: Ranks, fold: Callable[[list[Part]], Statistics]) -> Statistics | None:
    """What `fold` makes of the parts of all ranks, which adds them up in some order; on each rank.

    Each rank adds up some rows of the Gram matrices; all else is small.
    """
    if ranks.world == 1:
        return fold(parts) if parts else None
    light = [Part(part.leaf, part.sum.copy(gram=False), part.whole) for part in parts]
    everyone = ranks.gather((light, any(part.sum.gram is not None for part in parts)))
    shared = [theirs for theirs, _ in everyone]
    found = next((part.sum for theirs in shared for part in theirs), None)
    if found is None:
        return None
    cols = found.min.shape[0]
    counts = [end - begin for begin, end in (ranks.share(cols, r) for r in range(ranks.world))]
    stripes = [p.sum.gram.split(counts) for p in parts if p.sum.gram is not None]
    if any(grams for _, grams in everyone):
        incoming = [[torch.empty(counts[ranks.rank], cols) for _ in theirs] for theirs in shared]
        ranks.exchange([[stripe[r] for stripe in stripes] for r in range(ranks.world)], incoming)
        for theirs, arrived in zip(shared, incoming, strict=True):
            for part, gram in zip(theirs, arrived, strict=True):
                part.sum.gram = gram
    whole = fold([part for theirs in shared for part in theirs])
    if whole.gram is not None:
        (whole.gram,) = ranks.gather_rows([whole.gram], counts)
    return whole


def joined(parts: Iterable[Part]) -> Statistics:
    """The sum of everything, from the parts of all leaves in order. Changes them."""
    return _whole(list(parts)).sum


def _whole(parts: list[Part]) -> Part:
    groups: list[Part] = []
    for part in parts:
        if groups and groups[-1].leaf // GROUP == part.leaf // GROUP and not groups[-1].whole:
            groups[-1].sum.merge(part.sum)
        else:
            groups.append(part)
    total, *rest = groups
    for part in rest:
        total.sum.merge(part.sum)
    return Part(rest[-1].leaf if rest else total.leaf, total.sum, whole=True)
