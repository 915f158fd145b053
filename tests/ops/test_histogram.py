"""histogram_accumulate and merge_histograms count alike in any split, and as the reference counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import quantkit.ops as ops

from .calibrated_cases import histogram_cases
from .cpu_cases import FLOATS, check_refused, reference


def histogram(*parts: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    counts, span = torch.zeros(ops.HISTOGRAM_BINS, dtype=torch.int64), torch.zeros(1)
    for part in parts:
        ops.histogram_accumulate(part, counts, span, mask=mask)
    return counts, span


def mixed(seed: int) -> Tensor:
    """Magnitudes of many powers of two, their exact values among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 33, generator=generator)
    x *= torch.exp2(torch.randint(-30, 12, (60, 1), generator=generator))
    x[::9] = torch.exp2(torch.randint(-20, 12, (33,), generator=generator))
    x[4::9] = -x[::9][: x[4::9].shape[0]]
    x[7] = 0.0
    return x[torch.randperm(60, generator=generator)]


@pytest.mark.parametrize("dtype", FLOATS)
def test_any_split_counts_alike(dtype: torch.dtype) -> None:
    for seed in range(5):
        x = mixed(seed).to(dtype)
        whole = histogram(x)
        for split in (histogram(*x.split(1)), histogram(*x.flip(0).split(7)), histogram(x.T.contiguous())):
            assert torch.equal(split[0], whole[0]) and torch.equal(split[1], whole[1])
        merged = ops.merge_histograms(*histogram(x[:13]), *histogram(x[13:]))
        assert torch.equal(merged[0], whole[0]) and torch.equal(merged[1], whole[1])
        wide = x.double()
        width = whole[1].double() / 4096
        at = torch.where(wide < 0, 4095 - (-wide / width).floor(), 4096 + (wide / width).floor()).long()
        assert torch.equal(whole[0], torch.bincount(at.flatten(), minlength=8192))
        assert wide.abs().max() < whole[1] <= 2 * wide.abs().max()


def test_zeros_and_masks() -> None:
    counts, span = histogram(torch.zeros(3, 5), torch.zeros(0, 5))
    assert span.item() == 0 and counts[4096] == 15 == counts.sum()
    x = torch.ones(3, 5)
    x[1] = float("nan")
    counts, span = histogram(x, mask=torch.tensor([True, False, True]))
    assert counts.sum() == 10 and span.item() == 2
    for bad in (float("nan"), float("inf"), 3e38):
        x[1] = bad
        with pytest.raises(RuntimeError, match="quantkit::histogram_accumulate: x must be finite and below"):
            histogram(x)


def test_is_the_reference() -> None:
    for x, mask, counts, span in histogram_cases():
        for part in (x.contiguous(), torch.cat((x, x), 1)[:, 1 : 1 + x.shape[1]]):  # off any alignment, rows apart
            wanted, got = (counts.clone(), span.clone()), (counts.clone(), span.clone())
            reference("histogram_accumulate", part, mask, *wanted)
            ops.histogram_accumulate(part, *got, mask=mask)
            assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


def test_large_matrices_and_threads() -> None:
    """Threads and pieces whose spans differ."""
    x = torch.randn(700, 700, generator=torch.Generator().manual_seed(6)) * torch.logspace(-6, 3, 700)[:, None]
    threads = torch.get_num_threads()
    for part in (x, x.flip(0), x[:, 3:].bfloat16(), x[:, 5:]):
        wanted = torch.zeros(ops.HISTOGRAM_BINS, dtype=torch.int64), torch.zeros(1)
        reference("histogram_accumulate", part, None, *wanted)
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            got = histogram(part)
            assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
    torch.set_num_threads(threads)


def test_refuses_and_leaves_all_as_it_was() -> None:
    counts, span = torch.arange(8192), torch.tensor([0.5])
    for value in (float("nan"), float("inf"), -float("inf"), 2.0**127):
        x = torch.ones(300, 400)
        x[299, 399] = value
        check_refused("histogram_accumulate", r"x must be finite and below 2\^127", x, None, counts, span)
        assert torch.equal(counts, torch.arange(8192)) and span.item() == 0.5
    x = torch.ones(3, 4)
    for message, args in (
        (r"x must be 2-D \[tokens, columns\], got 1-D", (x[0], None, counts, span)),
        ("x must be float32, float16 or bfloat16", (x.int(), None, counts, span)),
        (r"counts must be torch.int64 \[8192\], got torch.int32", (x, None, counts.int(), span)),
        (r"span must be torch.float32 \[1\], got torch.float32 \[2\]", (x, None, counts, torch.zeros(2))),
        (r"mask must be torch.bool \[3\]", (x, torch.ones(4, dtype=torch.bool), counts, span)),
    ):
        check_refused("histogram_accumulate", message, *args)


def compiles_in_place(x: Tensor, mask: Tensor | None) -> None:
    args = (x, mask, torch.zeros(8192, dtype=torch.int64), torch.zeros(1))
    torch.library.opcheck(torch.ops.quantkit.histogram_accumulate.default, args)
    torch.compiler.reset()

    def count(x: Tensor) -> tuple[Tensor, Tensor]:
        counts, span = torch.zeros(8192, dtype=torch.int64), torch.zeros(1)
        torch.ops.quantkit.histogram_accumulate(x, mask, counts, span)
        return counts, span

    for got, wanted in zip(torch.compile(count, fullgraph=True, backend="aot_eager")(x), count(x), strict=True):
        assert torch.equal(got, wanted)


def test_compiles() -> None:
    compiles_in_place(torch.randn(5, 70), None)
    compiles_in_place(torch.randn(5, 70).bfloat16(), torch.tensor([True, False, True, True, False]))
