"""Sums over batches in an order that does not depend on who adds: floating-point sums of other orders differ.

Batches in a row make a leaf, a few leaves a group. A leaf adds up its batches, a group its leaves and the whole its
groups, each from left to right. Whoever works on some leaves in a row can do all additions that lie within these, and
whoever has the results of all does the rest; the additions are the same, however the leaves are shared out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..distributed import Ranks
from .statistics import ROWS, Statistics, Wants

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
        self._spare: list[Tensor] = []  # Gram matrices that have been added up

    def update(self, batch: int, x: Tensor, where: str | Callable[[], str]) -> None:
        """Take in x [tokens, channels] of `batch`; see `Statistics.update`."""
        leaf = self._leaves.of(batch)
        if self._leaf is None or self._leaf.leaf != leaf:
            self._close(leaf)
            spare = self._spare.pop() if self._spare else None
            self._leaf = Part(leaf, Statistics.empty(x.shape[1], self._wants, spare))
        self._leaf.sum.update(x, where)

    def parts(self) -> list[Part]:
        """The sums so far, in order; nothing more may come."""
        self._close(self._leaves.share[1])
        self._spare.clear()
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
            self._merge(before, done)
        else:
            self._parts.append(done)
        if first == 0 and following >= min((mine + 1) * GROUP, self._leaves.count):
            self._parts = [_whole(self._parts, self._merge)]

    def _merge(self, part: Part, following: Part) -> None:
        part.sum.merge(following.sum)
        if following.sum.gram is not None:
            self._spare.append(following.sum.gram)


def total(parts: list[Part], ranks: Ranks) -> Statistics | None:
    """The sum of everything from the parts of all ranks, the same on each; None if there are none. Changes `parts`."""
    return across(parts, ranks, joined, memory=parts[0].sum.gram if parts else None)


def across(
    parts: list[Part], ranks: Ranks, fold: Callable[[list[Part]], Statistics], memory: Tensor | None = None
) -> Statistics | None:
    """What `fold` makes of the parts of all ranks, which adds them up in some order; on each rank, complete. It may
    change `parts` if there is but one rank. Its Gram matrix lies in `memory`, which may be one of these parts'.

    Each rank adds up some rows of the Gram matrices' upper halves; all else is small.
    """
    if ranks.world == 1:
        return fold(parts).complete() if parts else None
    light = [Part(part.leaf, part.sum.copy(gram=False), part.whole) for part in parts]
    everyone = ranks.gather((light, any(part.sum.gram is not None for part in parts)))
    shared = [theirs for theirs, _ in everyone]
    found = next((part.sum for theirs in shared for part in theirs), None)
    if found is None:
        return None
    cols = found.min.shape[0]
    places = _rows_by_rank(cols, ranks)
    with_grams = any(grams for _, grams in everyone)
    if with_grams:
        size = sum((end - begin) * (cols - begin) for begin, end in places[ranks.rank])
        incoming = [[torch.empty(size) for _ in theirs] for theirs in shared]
        ranks.exchange(
            [[x for part in parts for x in _cut(part.sum.gram, places[r])] for r in range(ranks.world)],
            [[x for flat in flats for x in _laid_out(flat, places[ranks.rank], cols)] for flats in incoming],
        )
        for theirs, arrived in zip(shared, incoming, strict=True):
            for part, flat in zip(theirs, arrived, strict=True):
                part.sum.gram = flat
    whole = fold([part for theirs in shared for part in theirs])
    if whole.gram is not None:
        gram = torch.empty(cols, cols) if memory is None else memory
        ranks.exchange(
            [_laid_out(whole.gram, places[ranks.rank], cols)] * ranks.world, [_cut(gram, rows) for rows in places]
        )
        whole.gram, whole.upper = gram, True
    return whole.complete()


def _rows_by_rank(cols: int, ranks: Ranks) -> list[list[tuple[int, int]]]:
    """Rows (first, behind the last) of an upper half, some at a time, that each rank adds up: of about one area."""
    blocks = [(begin, min(begin + ROWS, cols)) for begin in range(0, cols, ROWS)]
    found: list[list[tuple[int, int]]] = [[] for _ in range(ranks.world)]
    for begin, end in blocks:
        left = (cols - (begin + end) / 2) / cols  # the area below is the square of this
        found[min(int((1 - left**2) * ranks.world), ranks.world - 1)].append((begin, end))
    return found


def _cut(gram: Tensor | None, places: Sequence[tuple[int, int]]) -> list[Tensor]:
    """These rows of a Gram matrix, from the diagonal on: views."""
    return [] if gram is None else [gram[begin:end, begin:] for begin, end in places]


def _laid_out(flat: Tensor, places: Sequence[tuple[int, int]], cols: int) -> list[Tensor]:
    """The same rows that lie one behind the other in `flat`: views."""
    sizes = [(end - begin) * (cols - begin) for begin, end in places]
    return [x.view(end - begin, -1) for x, (begin, end) in zip(flat.split(sizes), places, strict=True)]


def joined(parts: Iterable[Part]) -> Statistics:
    """The sum of everything, from the parts of all leaves in order. Changes them."""
    return _whole(list(parts), lambda part, following: part.sum.merge(following.sum)).sum


def _whole(parts: list[Part], merge: Callable[[Part, Part], None]) -> Part:
    groups: list[Part] = []
    for part in parts:
        if groups and groups[-1].leaf // GROUP == part.leaf // GROUP and not groups[-1].whole:
            merge(groups[-1], part)
        else:
            groups.append(part)
    total, *rest = groups
    for part in rest:
        merge(total, part)
    return Part(rest[-1].leaf if rest else total.leaf, total.sum, whole=True)
