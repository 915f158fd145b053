"""Keeping to a memory budget: hidden states in files, experts in groups, what the plan says of it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from quantkit import estimate as estimating
from quantkit.calibration.batches import batches
from quantkit.calibration.hidden import HiddenStates
from quantkit.checkpoint.reader import Checkpoint
from quantkit.config.recipe import AWQModifier, GPTQModifier, Modifier, QuantizationModifier, SmoothQuantModifier
from quantkit.config.run_config import CalibrationConfig
from quantkit.config.yaml_file import load_run_config
from quantkit.errors import CalibrationError, PlanError
from quantkit.live_output import LiveSink
from quantkit.memory import Choice, Means
from quantkit.plan import Plan, build_plan
from quantkit.report.plan_view import render_plan
from quantkit.report.table import size as render_size

from ..modifiers.test_pipeline import calibrated, int4, tokens
from .headers import llama, write_headers
from .test_sweep import rows
from .tiny import make

# Odd widths, so that batches begin within pages.
LENGTHS, HIDDEN = [7, 7, 33, 64, 3], 18


def filled(folder: Path | None, seed: int = 0) -> HiddenStates:
    states = HiddenStates(batches(rows(LENGTHS), 40), HIDDEN, torch.bfloat16, folder=folder)
    generator = torch.Generator().manual_seed(seed)
    for i in range(len(states)):
        states.put(i, torch.randn(states.view(i).shape, generator=generator))
    states.turn()
    return states


@pytest.mark.parametrize("offload", [False, True])
def test_states_are_what_was_put_whether_in_memory_or_on_disk(tmp_path: Path, offload: bool) -> None:
    plain, states = filled(None), filled(tmp_path if offload else None)
    assert len(states) == 4 and (states.file is not None) == offload
    for i in range(len(states)):
        assert torch.equal(states.view(i), plain.view(i))
        states.rest(i)
        kept = states.view(i)
        states.rest(i)
        assert torch.equal(kept, plain.view(i)), "a view of what rests is read again"


def test_on_disk_a_layer_reads_one_file_and_writes_the_other(tmp_path: Path) -> None:
    states = filled(tmp_path)
    first, before = states.file, states.view(2).clone()
    states.put(2, before + 1)
    assert torch.equal(states.view(2), before), "what entered is whole until the turn"
    for i in (0, 1, 3):
        states.put(i, states.view(i))
    states.turn()
    assert states.file != first and torch.equal(states.view(2), (before + 1).to(states.dtype))
    states.remove()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("to_disk", [False, True])
@pytest.mark.parametrize("from_disk", [False, True])
def test_states_saved_are_loaded(tmp_path: Path, from_disk: bool, to_disk: bool) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    states = filled(tmp_path / "a" if from_disk else None)
    states.save(tmp_path / "saved")
    if states.file is not None:
        states.save(states.file)
        assert states.file.read_bytes() == (tmp_path / "saved").read_bytes()
    other = filled(tmp_path / "b" if to_disk else None, seed=1)
    other.load(tmp_path / "saved")
    assert all(torch.equal(other.view(i), states.view(i)) for i in range(len(states)))


def test_a_new_process_finds_the_states_in_the_file_they_were_left_in(tmp_path: Path) -> None:
    states = filled(tmp_path)
    assert states.file is not None
    states.save(states.file)
    again = HiddenStates(batches(rows(LENGTHS), 40), HIDDEN, torch.bfloat16, folder=tmp_path)
    again.load(states.file)
    assert all(torch.equal(again.view(i), states.view(i)) for i in range(len(states)))


def test_states_of_other_batches_are_refused(tmp_path: Path) -> None:
    filled(None).save(tmp_path / "saved")
    other = HiddenStates(batches(rows([9])), HIDDEN, torch.bfloat16)
    with pytest.raises(CalibrationError, match=r"saved: has \d+ bytes"):
        other.load(tmp_path / "saved")
    with pytest.raises(CalibrationError, match="nowhere: No such file"):
        other.load(tmp_path / "nowhere")


def test_a_full_disk_is_said_before_it_is_written_to(tmp_path: Path) -> None:
    if not os.path.ismount("/dev/shm"):
        pytest.skip("no file system of a known size")
    free = os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize
    folder = Path("/dev/shm") / f"quantkit-test-{os.getpid()}"
    folder.mkdir()
    try:
        with pytest.raises(CalibrationError, match=r"hidden-states-0: No space left"):
            HiddenStates(batches(rows([1])), (free // 8) + (1 << 20), torch.float64, folder=folder)
    finally:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


# ---- runs


RECIPES: dict[str, tuple[Modifier, ...]] = {
    "gptq": (GPTQModifier(scheme=int4()),),
    "smooth_gptq": (SmoothQuantModifier(), GPTQModifier(scheme="W8A8")),
    "awq": (AWQModifier(scheme=int4(symmetric=False)),),
    "awq_parent": (AWQModifier(scheme=int4(symmetric=False), loss="parent", n_grid=4),),
    "static": (QuantizationModifier(scheme="W8A8_STATIC_ASYM", kv_cache_scheme="fp8"),),
}


def same(one: LiveSink, other: LiveSink) -> None:
    """Bit for bit."""
    assert one.weights.keys() == other.weights.keys()
    for name, quantized in one.weights.items():
        for part in ("codes", "scale", "zero_point"):
            mine, theirs = getattr(quantized, part), getattr(other.weights[name], part)
            assert (mine is None and theirs is None) or torch.equal(mine, theirs), f"{name} {part}"
    assert one.tensors.keys() == other.tensors.keys() and one.inputs.keys() == other.inputs.keys()
    assert all(torch.equal(value, other.tensors[name]) for name, value in one.tensors.items())
    assert all(torch.equal(scale, other.inputs[name][0]) for name, (scale, _) in one.inputs.items())
    for name, scales in one.caches.items():
        assert all(torch.equal(a, b) for a, b in zip(scales, other.caches[name], strict=True)), name


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_results_do_not_depend_on_where_hidden_states_lie(tmp_path: Path, recipe: str, model_type: str) -> None:
    make(tmp_path, model_type)
    data = [*tokens(3), *tokens(2, 29), *tokens(1, 300)]
    memory, one = calibrated(tmp_path, RECIPES[recipe], data)
    disk, other = calibrated(tmp_path, RECIPES[recipe], data, calibration=CalibrationConfig(offload="disk"))
    same(memory, disk)
    assert one.twice == other.twice, "nor does the number of forwards"


MOE = {
    "gptq": (GPTQModifier(scheme=int4(), low_data="rtn", min_tokens_per_module=8),),
    "gptq_few": (GPTQModifier(scheme=int4(), min_tokens_per_module=60),),
    "smooth_gptq": (SmoothQuantModifier(), GPTQModifier(scheme="W8A8")),
    "static": (QuantizationModifier(scheme="W8A8_STATIC_ASYM", kv_cache_scheme="fp8"),),
    "inner": (AWQModifier(scheme=int4(), mappings=[[["re:.*down_proj"], "re:.*up_proj"]]),),
    "gptq_everyone": (GPTQModifier(scheme=int4(), moe_calibrate_all_experts=True),),
    "everyone": (QuantizationModifier(scheme="W8A8_STATIC", moe_calibrate_all_experts=True),),
}


@pytest.mark.parametrize(
    ("recipe", "model_type"),
    [
        *((recipe, "qwen3_moe") for recipe in MOE),
        ("gptq", "qwen2_moe"),
        ("gptq_few", "mixtral"),
        ("gptq", "deepseek_v3"),
        ("gptq_everyone", "deepseek_v3"),
    ],
)
def test_experts_in_groups_are_what_they_are_together(
    tmp_path: Path, recipe: str, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, scales and report, for any size of group; batches are padded, and an expert may see no token."""
    make(tmp_path, model_type)
    data = tokens(2, 1) if recipe == "gptq_few" else [*tokens(3), *tokens(2, 29)]
    together, report = calibrated(tmp_path, MOE[recipe], data)
    assert bool(report.silent_experts) == (recipe == "gptq_few")
    for size, offload in ((1, "disk"), (3, "memory")):
        choice = Choice(Means("auto", offload, experts=size, kept=False), 0, 0)
        monkeypatch.setattr(estimating, "choose", lambda *_, choice=choice: choice)
        groups, other = calibrated(tmp_path, MOE[recipe], data)
        same(together, groups)
        for seconds in (report, other):
            seconds.modules[:] = [replace(m, seconds=0.0) for m in seconds.modules]
        assert report == other and report.to_json() == other.to_json()


# ---- plans

QWEN3_235B = {
    "model_type": "qwen3_moe",
    "hidden_size": 4096,
    "num_hidden_layers": 2,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 64,
    "head_dim": 128,
}


def planned(
    folder: Path, what: str, *, model: str = "moe", settings: str = "", more: str = "", samples: int = 256
) -> Plan:
    """Of headers alone: two layers of Qwen3-235B-A22B, or of a 70B Llama; 256 rows of 4096 tokens."""
    if model == "llama":
        llama(folder / model, hidden=8192, intermediate=28672, layers=2, kv=1024, vocab=128256)
    else:
        layers: list[dict[str, tuple[str, tuple[int, ...]]]] = [{"model.embed_tokens.weight": ("BF16", (151936, 4096))}]
        for i in range(2):
            parts = {"q_proj": (8192, 4096), "k_proj": (512, 4096), "v_proj": (512, 4096), "o_proj": (4096, 8192)}
            names = {f"self_attn.{name}": shape for name, shape in parts.items()} | {"mlp.gate": (128, 4096)}
            names |= {"post_attention_layernorm": (4096,)}
            for j in range(128):
                names |= {f"mlp.experts.{j}.{p}_proj": (1536, 4096) for p in ("gate", "up")}
                names[f"mlp.experts.{j}.down_proj"] = (4096, 1536)
            layers.append({f"model.layers.{i}.{name}.weight": ("BF16", shape) for name, shape in names.items()})
        write_headers(folder / model, QWEN3_235B, layers)
    yaml = folder / "job.yaml"
    yaml.write_text(
        f"global: {{save_path: {folder}{settings}}}\nmodel: {{model_path: {folder / model}}}\n{more}"
        f"compression: {{{what}}}\ndataset: {{data_path: job.yaml, max_seq_length: 4096, num_samples: {samples}}}"
    )
    with Checkpoint(folder / model) as checkpoint:
        return build_plan(load_run_config(yaml), checkpoint)


@pytest.fixture(autouse=True)
def much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans do not depend on what this machine has."""
    monkeypatch.setattr("quantkit.estimate.memory_available", lambda: 1 << 40)
    monkeypatch.setattr("quantkit.estimate.shutil.disk_usage", lambda path: SimpleNamespace(free=1 << 44))


GPTQ = "recipe: {GPTQModifier: {scheme: W4A16}}"
STATIC = "quantization: {name: fp8_static}"


def test_without_a_budget_all_is_in_memory(tmp_path: Path) -> None:
    made = planned(tmp_path, STATIC)
    assert made.means == Means("auto", "memory") and not made.shortages


def test_a_budget_takes_the_fastest_means_that_do(tmp_path: Path) -> None:
    """Each smaller budget takes more means; what changes results comes last and is said."""
    usual = planned(tmp_path, STATIC).estimate.memory_bytes
    budgets = {b: planned(tmp_path, STATIC, settings=f", memory_budget: {b}") for b in (usual, "16GB", "13GB", "3GB")}
    assert all(made.estimate.memory_bytes <= made.config.global_.memory_budget_bytes for made in budgets.values())
    assert not any(made.shortages or made.means.forwards == 2 for made in budgets.values())
    first, *others = (made.means for made in budgets.values())
    assert first == Means("auto", "memory") and all(not how.kept for how in others)
    assert [how.offload for how in others][-1] == "disk" and others[-1].experts is not None
    assert f"{others[-1].experts} experts of a layer at once" in render_plan(budgets["3GB"])


def test_the_promised_22_gb(tmp_path: Path) -> None:
    """Two layers need what 94 do. 455 GB as FP8, and as GPTQ, whose Gram matrices alone are 9.8 GB a layer."""
    for what in (STATIC, GPTQ):
        assert not planned(tmp_path, what, settings=", memory_budget: 22GB").shortages
        assert planned(tmp_path, what, settings=", memory_budget: 22GB").estimate.memory_bytes <= 22e9


def test_low_memory_is_the_tightest_budget(tmp_path: Path) -> None:
    low = planned(tmp_path, "quantization: {name: fp8_static, low_memory: true}")
    assert low.means.offload == "disk" and not low.means.kept and low.means.experts is not None
    refused = planned(tmp_path, STATIC, settings=", memory_budget: 300MB")
    assert low.estimate.memory_bytes <= 1.06 * refused.estimate.memory_bytes
    least = render_size(refused.estimate.memory_bytes)
    with pytest.raises(PlanError, match=f"needs at least about {least} of memory and global.memory_budget is 300.0 MB"):
        refused.require_room()


def test_two_forwards_by_a_budget_are_said_aloud(tmp_path: Path) -> None:
    usual = planned(tmp_path, GPTQ, model="llama", samples=8)
    assert usual.means.forwards == "auto" and usual.estimate.held_bytes
    least = planned(tmp_path, GPTQ, model="llama", samples=8, settings=", memory_budget: 1GB").estimate.memory_bytes
    tight = planned(tmp_path, GPTQ, model="llama", samples=8, settings=f", memory_budget: {least}")
    assert tight.means.forwards == 2 and not tight.shortages
    assert f"memory_budget {least} leaves no room for one forward a layer" in tight.warnings[-1]
    one = f", memory_budget: {least}, calibration_forwards: 1"
    said = planned(tmp_path, GPTQ, model="llama", samples=8, settings=one)
    assert "set global.calibration_forwards to 2" in said.shortages[0]


def test_what_crosses_experts_is_refused_in_groups(tmp_path: Path) -> None:
    made = planned(tmp_path, "recipe: {AWQModifier: {scheme: W4A16}}", settings=", memory_budget: 8GB")
    assert made.means.experts is None and "smoothed together, experts among them" in made.shortages[0]
    inner = "recipe: {AWQModifier: {scheme: W4A16, mappings: [[['re:.*down_proj'], 're:.*up_proj']]}}"
    assert planned(tmp_path, inner, settings=", memory_budget: 14GB").means.experts is not None
    parent = inner.replace("W4A16,", "W4A16, loss: parent,")
    assert "AWQ's loss: parent" in planned(tmp_path, parent, settings=", memory_budget: 14GB").shortages[0]


def test_an_explicit_place_of_hidden_states_is_kept(tmp_path: Path) -> None:
    made = planned(tmp_path, STATIC, settings=", memory_budget: 4GB", more="calibration: {offload: memory}\n")
    assert made.means.offload == "memory"
    assert "set calibration.offload to auto, which takes about" in made.shortages[0]
