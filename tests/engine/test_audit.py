"""The audit of outputs in which data had a say: what GPTQ, AWQ and a KV cache leave, intact and tampered with."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.audit import AuditResult, audit
from quantkit.checkpoint.reader import Checkpoint

from ..e2e.jobs import EXAMPLES, quantize_by

RECIPE = (
    "{AWQModifier: {n_grid: 4}, GPTQModifier: {scheme: {W4A16: ['re:.*mlp.*'], W8A8: ['re:.*attn.*']}, "
    "kv_cache_scheme: fp8}}"
)
UP, GATE, OUT = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.gate_proj", "model.layers.1.self_attn.o_proj"
NORM, KEYS = "model.layers.1.input_layernorm.weight", "model.layers.1.self_attn.k_scale"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Audited as it was written, or `quantize_by` would not give it back."""
    small = ("dataset.num_samples=4", "dataset.max_seq_length=64")
    return quantize_by("tiny-llama", RECIPE, tmp_path_factory.mktemp("audit"), *small)


def checked(made: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> AuditResult:
    """The audit after `change` to the tensors."""
    shutil.copytree(made, folder / "changed")
    tensors = load_file(made / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "changed" / "model.safetensors", metadata={"format": "pt"})
    with Checkpoint(EXAMPLES / "models" / "tiny-llama") as source:
        return audit(folder / "changed", source, progress=False)


def test_calibrated_weights_are_near_their_source(made: Path, tmp_path: Path) -> None:
    result = checked(made, tmp_path, lambda tensors: None)
    assert result.ok, result.problems
    assert result.rewritten == 2 * 4 and "8 rescaled in full precision" in result.render()
    figures = {w.module: w.sqnr_db for w in result.weights}
    assert 10 < figures[UP] < 25 and 30 < figures[OUT] < 45
    record = json.loads((made / "quantkit_config.json").read_text())
    assert record["methods"][UP] == "gptq" and OUT in record["rescaled"] and NORM in record["rewritten"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda t: t[f"{UP}.weight_packed"].copy_(t[f"{UP}.weight_packed"].flip(0)),
            r"up_proj: -?(inf|\d.*) dB of signal",
        ),
        (lambda t: t[f"{GATE}.weight_scale"][7].mul_(3), r"gate_proj: row 7: more noise than signal"),
        (
            lambda t: t[f"{OUT}.weight"].clamp_(-20, 20),
            r"o_proj: 1?\d\.\d dB of signal .*8 bits give",
        ),
        (
            lambda t: t[f"{UP}.weight_scale"][0, 0].fill_(float("inf")),
            "weight_scale: .* finite and not zero",
        ),
        (lambda t: t[f"{UP}.weight_scale"][0, 0].zero_(), "weight_scale: .* finite and not zero"),
        (lambda t: t[f"{UP}.weight_scale"].neg_(), "up_proj: -inf dB of signal"),
        (
            lambda t: t[f"{OUT}.weight_scale"][0].neg_(),
            "o_proj.weight_scale: .* finite and positive",
        ),
        (lambda t: t[NORM][3].fill_(float("nan")), f"{NORM}: rescaled, and has NaN or Inf"),
        (lambda t: t[NORM][3:5].zero_(), f"{NORM}: rescaled, and has zeros that the source has not"),
        (lambda t: t.update({NORM: t[NORM].float()}), rf"{NORM}: F32 \[256\], expected BF16 \[256\]"),
        (lambda t: t[KEYS].zero_(), rf"{KEYS}: \[0.0\] is not finite and positive"),
        (lambda t: t.pop(KEYS), f"{KEYS}: missing"),
        (lambda t: t["model.norm.weight"][3].zero_(), "model.norm.weight: carried over, but its bytes differ"),
    ],
)
def test_what_is_wrong_is_found(
    made: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], problem: str
) -> None:
    result = checked(made, tmp_path, change)
    assert any(re.search(problem, p) for p in result.problems), result.problems


def test_without_its_record_an_output_counts_as_rounded(made: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(made, tmp_path / "copy")
    (copy / "quantkit_config.json").unlink()
    with Checkpoint(EXAMPLES / "models" / "tiny-llama") as source:
        problems = audit(copy, source, progress=False).problems
        (copy / "quantkit_config.json").write_text("[")
        (broken,) = audit(copy, source, progress=False).problems
    assert any("half a code" in p for p in problems) and any("bytes differ" in p for p in problems)
    assert "missing, so every weight counts as rounded" in problems[-1]
    assert "not a record of quantkit" in broken
