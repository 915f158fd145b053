"""Sums over batches in an order that does not depend on who adds: floating-point sums of other orders differ.

Batches in a row make a leaf, a few leaves a group. A leaf adds up its batches, a group its leaves and the whole its
groups, each from left to right. Whoever works on some leaves in a row can do all additions that lie within these, and
whoever has the results of all does the rest; the additions are the same, however the leaves are shared out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from .statistics import Statistics, Wants

# One process holds three sums of an input at most, whatever these are. Sixteen leaves share out well over up to eight
# processes, and adding up a leaf costs little against its tokens.
LEAVES, GROUP = 16, 4


@dataclass(frozen=True)
class Leaves:
    """`batches` in a row, cut into leaves, of which `share` (first, behind the last) are worked on here."""

    batches: int
    share: tuple[int, int] = (0, LEAVES)

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

    def total(self) -> Statistics:
        """The sum, where every leaf is worked on here."""
        return joined(self.parts())

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
