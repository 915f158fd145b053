"""What `quantkit.load` and `quantkit.swap_linears` say no to, before they work, with the tensor and the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quantkit
from quantkit.config.presets import int_weights
from quantkit.config.schemes import QuantizationArgs, QuantizationScheme
from quantkit.errors import CheckpointError, ConfigError, PlanError, QuantkitError

from .jobs import EXAMPLES, quantize, quantize_by

pytest.importorskip("transformers")

Q = "model.layers.1.self_attn.q_proj"
Change = Callable[[dict[str, Tensor], dict[str, Any]], object]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("out")
    found = {name: quantize("tiny-llama", name, folder) for name in ("W8A8", "W4A16_ASYM", "FP8")}
    found["cache"] = quantize_by("tiny-llama", "{QuantizationModifier: {scheme: W8A8, kv_cache_scheme: fp8}}", folder)
    return found


def changed(source: Path, folder: Path, change: Change) -> Path:
    """A copy of a quantized folder with tensors or config.json changed."""
    copy = folder / "changed"
    shutil.copytree(source, copy)
    tensors = load_file(copy / "model.safetensors")
    config = json.loads((copy / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def group(config: dict[str, Any]) -> dict[str, Any]:
    return config["quantization_config"]["config_groups"]["group_0"]


CASES: dict[str, tuple[str, Change, str]] = {
    "no scale": (
        "W8A8",
        lambda t, c: t.pop(f"{Q}.weight_scale"),
        rf"'{Q}.weight' holds codes \(I8\), but .*weight_scale",
    ),
    "no packed scale": (
        "W4A16_ASYM",
        lambda t, c: t.pop(f"{Q}.weight_scale"),
        rf"'{Q}.weight_.*weight_scale' is missing",
    ),
    "no weight": ("W8A8", lambda t, c: t.pop(f"{Q}.weight"), rf"'{Q}.weight'.* is missing"),
    "no zero point": (
        "W4A16_ASYM",
        lambda t, c: t.pop(f"{Q}.weight_zero_point"),
        rf"'{Q}.weight_zero_point' is missing",
    ),
    "no shape": ("W4A16_ASYM", lambda t, c: t.pop(f"{Q}.weight_shape"), rf"'{Q}.weight_shape' is missing"),
    "no input scale": ("FP8", lambda t, c: t.pop(f"{Q}.input_scale"), rf"{Q}.input_scale"),
    "scale of another shape": (
        "W8A8",
        lambda t, c: t.update({f"{Q}.weight_scale": torch.ones(255, 1)}),
        rf"'{Q}.weight_scale' has shape \[255, 1\].* needs \[256, 1\]",
    ),
    "codes of another shape": (
        "W8A8",
        lambda t, c: t.update({f"{Q}.weight": t[f"{Q}.weight"][:, :128].contiguous()}),
        rf"'{Q}' has shape \[256, 128\], LlamaForCausalLM .* needs \[256, 256\]",
    ),
    "words that do not fit the shape": (
        "W4A16_ASYM",
        lambda t, c: t.update({f"{Q}.weight_packed": t[f"{Q}.weight_packed"][:, 1:].contiguous()}),
        rf"'{Q}.weight_packed' has shape \[256, 31\].* needs \[256, 32\]",
    ),
    "codes of another dtype": (
        "W8A8",
        lambda t, c: t.update({f"{Q}.weight": t[f"{Q}.weight"].to(torch.float8_e4m3fn)}),
        rf"'{Q}.weight' has dtype F8_E4M3, .* need I8",
    ),
    "zero points of a symmetric weight": (
        "W8A8",
        lambda t, c: t.update({f"{Q}.weight_zero_point": torch.zeros(256, 1, dtype=torch.int8)}),
        rf"'{Q}.weight_zero_point' does not belong to weights int8 per channel",
    ),
    "a tensor that no module takes": (
        "W8A8",
        lambda t, c: t.update({"model.layers.1.mlp.extra.weight": torch.ones(2)}),
        r"'model.layers.1.mlp.extra.weight' in the checkpoint, but no part",
    ),
    "a norm is missing": ("W8A8", lambda t, c: t.pop("model.norm.weight"), r"needs 'model.norm.weight'"),
    "NaN in a scale": ("W8A8", lambda t, c: t[f"{Q}.weight_scale"].fill_(float("nan")), rf"'{Q}.weight_scale' has NaN"),
    "a method of others": (
        "W8A8",
        lambda t, c: c["quantization_config"].update(quant_method="hqq"),
        r"quant_method 'hqq' is not one that quantkit reads \(compressed-tensors, gptq, awq, fp8, mindie, bits",
    ),
    "two bits": (
        "W8A8",
        lambda t, c: group(c)["weights"].update(num_bits=2),
        r"group_0.weights: num_bits: 2 is not supp",
    ),
    "no group for a module": (
        "W8A8",
        lambda t, c: group(c).update(targets=["re:.*mlp"]),
        r"self_attn.* has quantized tensors, and no config group's targets match it",
    ),
    "static activations where none are stored": (
        "W8A8",
        lambda t, c: group(c)["input_activations"].update(dynamic=False, strategy="tensor"),
        r"input_scale",
    ),
    "no scale of values": (
        "cache",
        lambda t, c: t.pop("model.layers.1.self_attn.v_scale"),
        r"'model.layers.1.self_attn.k_scale' is there, but 'model.layers.1.self_attn.v_scale' is missing",
    ),
    "cache scales that nothing announces": (
        "cache",
        lambda t, c: c["quantization_config"].update(kv_cache_scheme=None),
        r"k_scale.* in the checkpoint, but no part",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_that_does_not_fit_is_refused(case: str, outputs: dict[str, Path], tmp_path: Path) -> None:
    scheme, change, message = CASES[case]
    with pytest.raises(QuantkitError, match=message):
        quantkit.load(changed(outputs[scheme], tmp_path, change))


def test_a_truncated_file_is_refused(outputs: dict[str, Path], tmp_path: Path) -> None:
    copy = changed(outputs["W8A8"], tmp_path, lambda t, c: None)
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model.safetensors"):
        quantkit.load(copy)


def test_a_plain_checkpoint_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"not quantized.*load it with Transformers.*swap_linears"):
        quantkit.load(EXAMPLES / "models" / "tiny-llama")


def test_arguments_are_checked(outputs: dict[str, Path]) -> None:
    folder = outputs["W8A8"]
    with pytest.raises(ConfigError, match="kernels for cpu only, not for cuda"):
        quantkit.load(folder, device="cuda")
    with pytest.raises(ConfigError, match="'gpu' is not a device"):
        quantkit.load(folder, device="gpu")
    with pytest.raises(ConfigError, match="dtype: 'int8' is not one of float32, float16, bfloat16"):
        quantkit.load(folder, dtype="int8")
    with pytest.raises(ConfigError, match="attn_implementation: 'none_such'"):
        quantkit.load(folder, attn_implementation="none_such")
    with pytest.raises(CheckpointError, match="no such folder"):
        quantkit.load(Path("/nowhere"))


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 8))


def test_swap_linears_refuses() -> None:
    for scheme, message in (
        ("FP8", "scheme FP8: static activations need calibration data"),
        ("W8A9", "no such scheme: 'W8A9'"),
        (8, "expected the name of a preset or a QuantizationScheme, got 8"),
        (
            QuantizationScheme("odd", QuantizationArgs(8, strategy="block", block_structure=(8, 8))),
            "odd: no kernel runs",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            quantkit.swap_linears(plain(), scheme)
    with pytest.raises(PlanError, match="2: 64 input features do not divide by the group size 128"):
        quantkit.swap_linears(plain(), QuantizationScheme("g", int_weights(8, 128)))
    with pytest.raises(PlanError, match="'re:x' matches no Linear"):
        quantkit.swap_linears(plain(), targets="re:x")
    with pytest.raises(PlanError, match="ignore: 'x' matches nothing"):
        quantkit.swap_linears(plain(), ignore=["x"])
    with pytest.raises(PlanError, match="nothing is left"):
        quantkit.swap_linears(plain(), ignore=["0", "2"])
    with pytest.raises(PlanError, match="they are QuantLinears already"):
        quantkit.swap_linears(quantkit.swap_linears(plain()))
    with pytest.raises(PlanError, match="not in memory"):
        quantkit.swap_linears(plain().to("meta"))
    with pytest.raises(PlanError, match=r"ReLU has no torch.nn.Linear"):
        quantkit.swap_linears(nn.ReLU())
