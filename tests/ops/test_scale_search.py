"""Every search for a scale wins the case that benchmarks/scale_search.py says it wins."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("scale_search")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_method_wins_its_case(search: Any, seed: int) -> None:
    for method, name, bits, measure in search.CASES:
        found = search.figures(search.values(name, seed), bits, measure)
        if (method, name) == ("mse", "ReLU(normal)"):
            assert abs(found.pop("eq") - found["mse"]) < 0.02  # as good, which the table says
        assert measure.best(found) == method, (name, bits, measure.name, found)
    assert {case[0] for case in search.CASES} == set(search.METHODS)


def test_wins_that_matter(search: Any) -> None:
    """By how much the ones win that do so by more than a little."""
    cases = {method: (name, bits, measure) for method, name, bits, measure in search.CASES}

    def figures(method: str) -> dict[str, float]:
        name, bits, measure = cases[method]
        return search.figures(search.values(name, 0), bits, measure)

    worst = figures("minmax")
    assert min(v for m, v in worst.items() if m != "minmax") > 10 * worst["minmax"]
    sound = figures("percentile")
    assert sound.pop("percentile") > 30 > 1 > max(sound.values())
    kept = figures("kl")
    assert min(v for m, v in kept.items() if m != "kl") > 1.1 * kept["kl"]
    saturated = figures("admm")
    assert saturated.pop("admm") > 3 + max(saturated.values())


def test_mse_and_eq_agree_on_smooth_values(search: Any) -> None:
    """The largest cosine and the least squared error are the same codes' but for the grid of scales."""
    for seed in range(3):
        x = torch.randn(1 << 16, generator=torch.Generator().manual_seed(seed))
        for bits in (4, 8):
            found = search.figures(x, bits, search.SQNR)
            assert abs(found["mse"] - found["eq"]) < 0.05
