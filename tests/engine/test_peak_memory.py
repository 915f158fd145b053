"""The peak of a run's resident set, in a process of its own: whatever the depth, within a budget."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bench() -> Any:
    """benchmarks/memory.py."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        spec = importlib.util.spec_from_file_location("memory_benchmark", ROOT / "benchmarks" / "memory.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


SMALL = {"hidden": 512, "intermediate": 1536, "heads": 8, "kv_heads": 4}


@pytest.mark.parametrize("recipe", ["static"])
def test_the_peak_does_not_depend_on_the_depth(bench: Any, tmp_path: Path, recipe: str) -> None:
    """20 layers more are 130 MB more on disk."""
    found = []
    for layers in (4, 24):
        model = bench.make_llama(tmp_path / f"llama-{layers}", layers=layers, **SMALL)
        found.append(bench.run(model, bench.RECIPES[recipe], (8, 128), {"num_threads": 1}))
    shallow, deep = found
    assert deep.source - shallow.source > 120e6
    assert deep.peak <= 1.03 * shallow.peak
    assert all(0.8 * run.peak <= run.predicted <= 1.2 * run.peak for run in found), found


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["gptq", "static"])
def test_a_budget_is_kept_where_a_layer_of_experts_is_larger(bench: Any, tmp_path: Path, recipe: str) -> None:
    """302 MB of weights in a layer, 0.9 GB in all, and half a gigabyte for everything; more cannot be allocated."""
    shape = {"hidden": 1024, "intermediate": 768, "heads": 16, "kv_heads": 4, "experts": 64}
    model = bench.make_llama(tmp_path / "experts", layers=3, **shape)
    budget = 600_000_000
    found = bench.run(model, bench.RECIPES[recipe], (8, 256), {"memory_budget": budget, "num_threads": 1}, budget)
    assert found.peak <= budget and found.predicted <= budget
    assert "of a layer at once" in found.means
