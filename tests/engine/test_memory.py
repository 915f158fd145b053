"""Keeping to a memory budget: hidden states in files, experts in groups, what the plan says of it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quantkit import plan as planning
from quantkit.calibration.batches import batches
from quantkit.calibration.hidden import HiddenStates
from quantkit.config.recipe import AWQModifier, GPTQModifier, Modifier, QuantizationModifier, SmoothQuantModifier
from quantkit.config.run_config import CalibrationConfig
from quantkit.errors import CalibrationError
from quantkit.live_output import LiveSink
from quantkit.memory import means

from ..modifiers.test_pipeline import calibrated, int4, tokens
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
    "everyone": (QuantizationModifier(scheme="W8A8_STATIC", moe_calibrate_all_experts=True),),
}


@pytest.mark.parametrize(
    ("recipe", "model_type"),
    [
        *((recipe, "qwen3_moe") for recipe in MOE),
        ("gptq", "qwen2_moe"),
        ("gptq_few", "mixtral"),
        ("gptq", "deepseek_v3"),
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
        monkeypatch.setattr(planning, "means", lambda config: replace(means(config), experts=size))  # noqa: B023
        groups, other = calibrated(tmp_path, MOE[recipe], data, calibration=CalibrationConfig(offload=offload))
        same(together, groups)
        for seconds in (report, other):
            seconds.modules[:] = [replace(m, seconds=0.0) for m in seconds.modules]
        assert report == other and report.to_json() == other.to_json()
