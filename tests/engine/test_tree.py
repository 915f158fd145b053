"""Sums over batches come out the same, bit by bit, however the batches are shared out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkit.calibration.statistics import Statistics, Wants
from quantkit.calibration.tree import GROUP, LEAVES, Leaves, Part, Sums, joined

EVERYTHING = Wants(gram=True, histogram=True, averages=True)


def summed(data: list[Tensor], share: tuple[int, int], missing: frozenset[int] = frozenset()) -> list[Part]:
    leaves = Leaves(len(data), share)
    sums = Sums(leaves, EVERYTHING)
    most = 0
    for i, x in enumerate(data):
        if share[0] <= leaves.of(i) < share[1] and i not in missing:
            sums.update(i, x, "x")
            most = max(most, len(sums._parts) + 1)
    assert share[0] or most <= 3, "total, group and leaf at most"
    return sums.parts()


def shares(count: int, ranks: int) -> list[tuple[int, int]]:
    return [(r * count // ranks, (r + 1) * count // ranks) for r in range(ranks)]


def same(a: Statistics, b: Statistics) -> None:
    assert a.count == b.count and a.histogram is not None and b.histogram is not None
    for mine, theirs in (
        (a.min, b.min),
        (a.max, b.max),
        (a.absum, b.absum),
        (a.gram, b.gram),
        (a.averages, b.averages),
        (a.histogram.counts, b.histogram.counts),
    ):
        assert mine is not None and theirs is not None and torch.equal(mine, theirs)


@pytest.mark.parametrize("batches", [1, 2, 5, 15, 16, 17, 40])
def test_any_split_gives_the_same_bits(batches: int) -> None:
    data = [torch.randn(3 + i % 4, 8) * 2.0 ** (i % 5) for i in range(batches)]
    whole = Sums(Leaves(batches), EVERYTHING)
    for i, x in enumerate(data):
        whole.update(i, x, "x")
    expected = joined(whole.parts())
    for ranks in (1, 2, 3, 4, 5, 7, 8, 16, 20):
        parts = [p for share in shares(Leaves(batches).count, ranks) for p in summed(data, share)]
        same(joined(parts), expected)
    x = torch.cat(data)
    torch.testing.assert_close(expected.gram, x.T @ x, rtol=1e-4, atol=1e-2)
    low, high = data[0].min(), data[0].max()
    for x in data[1:]:
        low, high = low + 0.01 * (x.min() - low), high + 0.01 * (x.max() - high)
    assert torch.equal(expected.averages, torch.stack((low, high)))  # type: ignore[arg-type]


def test_batches_that_bring_nothing_change_nothing_about_that() -> None:
    data = [torch.randn(4, 8) for _ in range(33)]
    missing = frozenset(range(8, 17)) | {0, 1, 30}
    expected = joined(summed(data, (0, LEAVES), missing))
    for ranks in (2, 3, 5, 16):
        parts = [p for share in shares(LEAVES, ranks) for p in summed(data, share, missing)]
        same(joined(parts), expected)


def test_leaves_are_in_order_and_alike_in_size() -> None:
    for batches in (1, 3, 16, 31, 100):
        leaves = Leaves(batches)
        found = [leaves.of(i) for i in range(batches)]
        sizes = [found.count(i) for i in range(leaves.count)]
        assert found == sorted(found) and max(sizes) - min(sizes) <= 1 and min(sizes) >= 1
    assert LEAVES % GROUP == 0
