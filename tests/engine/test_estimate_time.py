"""Hours on paper: work is counted right from headers, and the table in docs/scale.md is what its script makes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from quantkit import estimate
from quantkit.calibration import shared_experts, tree
from quantkit.checkpoint.reader import Checkpoint
from quantkit.cli import main
from quantkit.config.recipe_file import recipe_of
from quantkit.config.run_config import CompressionConfig, DatasetConfig, GlobalConfig, ModelConfig, RunConfig
from quantkit.estimate_time import CPU, H100, SHARED, Rates, Work, seconds, spell, total, work_of
from quantkit.memory import LEAVES, ROUND_BYTES
from quantkit.plan import Plan, build_plan

from ..e2e.jobs import EXAMPLES
from .headers import llama

ROOT = Path(__file__).resolve().parents[2]
HIDDEN, MLP, LAYERS, TOKENS = 256, 512, 3, 8 * 64


def plan(folder: Path, modifiers: dict[str, Any], ranks: int = 1) -> Plan:
    config = RunConfig(
        GlobalConfig(save_path=str(folder / "out")),
        ModelConfig(str(folder)),
        CompressionConfig(recipe=recipe_of(modifiers)),
        DatasetConfig(data_path="rows", max_seq_length=64, num_samples=8),
        source=folder,
        stem="out",
    )
    model = llama(folder / "model", hidden=HIDDEN, intermediate=MLP, layers=LAYERS, kv=128, vocab=512)
    with Checkpoint(model) as checkpoint:
        return build_plan(config, checkpoint, ranks, ranks)


def test_work_is_counted_from_headers(tmp_path: Path) -> None:
    gptq = work_of(plan(tmp_path, {"GPTQModifier": {"scheme": "W4A16"}}))
    area = 2 * HIDDEN**2 + 2 * 128 * HIDDEN + 3 * HIDDEN * MLP  # of a layer
    assert gptq.round == LAYERS * area and gptq.linears == LAYERS * 7
    # q, k and v share an input, and so do gate and up; o and down have their own.
    assert gptq.gram == LAYERS * TOKENS * (3 * HIDDEN**2 + MLP**2)
    assert gptq.factor == LAYERS * (3 * HIDDEN**3 + MLP**3)
    assert gptq.sweep == LAYERS * ((2 * HIDDEN + 2 * 128 + 2 * MLP) * HIDDEN**2 + HIDDEN * MLP**2)
    assert gptq.forward >= LAYERS * TOKENS * area and gptq.experts == gptq.search == 0
    awq = work_of(plan(tmp_path, {"AWQModifier": {"scheme": "W4A16_ASYM"}}))
    assert awq.search > 0 and awq.factor == 0 and awq.forward > 1.9 * gptq.forward  # two forwards
    free = work_of(plan(tmp_path, {"QuantizationModifier": {"scheme": "FP8_DYNAMIC"}}))
    assert free.forward == free.linears == 0 and free.read > 2 * LAYERS * area and free.write < free.read


def test_time_is_work_over_rates() -> None:
    rates = Rates("test", "made up", 2, Work(*[10.0] * 11), start=1.0, calibrating=5.0)
    work = Work(forward=100.0, gram=50.0, linears=1.0, read=30.0, write=200.0, audit=40.0)
    spent = seconds(work, rates)
    assert spent["forward"] == 10 and spent["start"] == 5
    assert total(spent) == 5 + 20 + 4, "writing is slowest; the audit comes behind"
    assert seconds(work, rates, cores=4)["forward"] == 5 and seconds(work, rates, cores=4)["read"] == 3
    assert seconds(work, rates, devices=4)["forward"] == pytest.approx(10 / (4 * SHARED))
    assert total(seconds(Work(read=5.0), rates)) == 1.5, "without data less has to be loaded"
    for rates in (CPU, H100):
        assert all(value > 0 for value in vars(rates.work).values())
    assert "not measured" in H100.basis


def test_durations_are_told_in_units_that_fit() -> None:
    assert [spell(s) for s in (0.05, 42, 300, 7200, 400_000)] == ["0.1 s", "42 s", "5.0 min", "2.0 h", "4.6 days"]


def test_ranks_take_memory_each(tmp_path: Path) -> None:
    assert LEAVES == tree.LEAVES and ROUND_BYTES == shared_experts.ROUND_BYTES
    one = plan(tmp_path, {"GPTQModifier": {"scheme": "W4A16"}}).estimate
    four = plan(tmp_path, {"GPTQModifier": {"scheme": "W4A16"}}, ranks=4).estimate
    assert four.memory_bytes == one.memory_bytes, "means, and so results, do not depend on the ranks"
    assert four.rank_bytes < one.memory_bytes < four.machine_bytes == 4 * four.rank_bytes
    assert one.machine_bytes == one.memory_bytes == one.rank_bytes


def test_plan_says_hours_and_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = ["plan", "-c", str(EXAMPLES / "tiny_llama_smoothquant_gptq.yaml"), "--save-path", str(tmp_path)]
    assert main(job) == 0
    one = capsys.readouterr().out
    assert "time     about " in one and "(computed, not measured)" in one and "one H100" in one
    assert main([*job, "--ranks", "2"]) == 0
    two = capsys.readouterr().out
    assert "needed by each of 2 ranks" in two and "on 2 ranks of " in two
    assert main([*job, "--ranks", "0"]) == 2 and "--ranks 0" in capsys.readouterr().err


def test_the_table_in_the_documentation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(estimate, "memory_available", estimate.memory_available)  # which the script replaces
    import scale_table

    text = (ROOT / "docs" / "scale.md").read_text()
    args = scale_table.options([])
    assert scale_table.markdown(scale_table.heads(args)) in text
    name = "Qwen3-235B-A22B"
    for title in ("GPTQ W4A16", "FP8 dynamic (no data)"):
        row = scale_table.markdown(scale_table.rows_of(name, scale_table.MODELS[name], title, args))
        assert row in text, f"docs/scale.md is not what benchmarks/scale_table.py prints: {row}"
    assert all(f"| {model} | GPTQ W4A16 |" in text for model in scale_table.MODELS)
    sys.modules.pop("scale_table")
