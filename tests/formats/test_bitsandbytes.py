"""LLM.int8() as bitsandbytes stores it: bytes decoded in numpy, its arithmetic written out, conversions, the check."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.checkpoint.reader import Checkpoint
from quantkit.cli import main
from quantkit.config.presets import INT8_TOKEN, preset
from quantkit.config.schemes import QuantizationArgs
from quantkit.conformance import check_folder
from quantkit.convert import convert
from quantkit.errors import CheckpointError, ConfigError, QuantkitError
from quantkit.formats import bitsandbytes as bnb
from quantkit.formats.source import WeightSource, fake_quantize
from quantkit.inspection import inspect_folder

from ..e2e.jobs import EXAMPLES, quantize_by
from .test_mindie_cache import raw

RECIPE = "{QuantizationModifier: {scheme: LLM_INT8}}"
Q = "model.layers.1.self_attn.q_proj"


def written(tmp_path: Path, scheme: str = "LLM_INT8", model: str = "tiny-llama", ignore: str = "[]") -> Path:
    recipe = f"{{QuantizationModifier: {{scheme: {scheme}, ignore: {ignore}}}}}"
    return quantize_by(model, recipe, tmp_path, "compression.save_name=bitsandbytes", "global.overwrite=true")


def test_the_bytes(tmp_path: Path) -> None:
    output = written(tmp_path, ignore="['re:.*layers.0.mlp.*']")
    block = json.loads((output / "config.json").read_text())["quantization_config"]
    assert block["quant_method"] == "bitsandbytes" and block["load_in_8bit"] is True
    assert block["llm_int8_threshold"] == 6.0 and block["llm_int8_has_fp16_weight"] is False
    assert {"lm_head", "model.layers.0.mlp.up_proj"} <= set(block["llm_int8_skip_modules"])
    found, source = raw(output / "model.safetensors"), load_file(EXAMPLES / "models/tiny-llama/model.safetensors")
    modules = [name.removesuffix(".SCB") for name in found if name.endswith(".SCB")]
    assert len(modules) == 25
    for module in modules:
        dtype, shape, data = found[f"{module}.weight"]
        codes = np.frombuffer(data, np.int8).reshape(shape)
        weight = source[f"{module}.weight"].float().numpy()
        absmax = np.frombuffer(found[f"{module}.SCB"][2], np.float32)
        assert dtype == "I8" and found[f"{module}.SCB"][:2] == ("F32", [shape[0]])
        assert found[f"{module}.weight_format"] == ("U8", [], b"\0")
        # The row's largest magnitude, its code 127, and everything else within half a code.
        np.testing.assert_allclose(absmax, np.abs(weight).max(1), rtol=2e-7)
        assert (np.abs(codes).max(1) == 127).all()
        assert (np.abs(codes * (absmax / np.float32(127))[:, None] - weight) <= absmax[:, None] / 253.9).all()


def test_the_arithmetic() -> None:
    """Outliers by column, rows by their largest magnitude without them, in numpy."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(7, 64, generator=generator)
    x[3, 5], x[6, 40] = 9.0, -6.0
    got = fake_quantize(x, replace(INT8_TOKEN, outlier_threshold=6.0)).numpy()
    a = x.numpy()
    outlier = (np.abs(a) >= 6).any(0)
    assert outlier.nonzero()[0].tolist() == [5, 40]
    inside = np.where(outlier, 0, a)
    scale = np.abs(inside).max(1, keepdims=True) / np.float32(127)
    expected = np.where(outlier, a, np.rint(inside / scale) * scale)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7)
    weight = torch.randint(-127, 128, (48, 64), generator=generator, dtype=torch.int8)
    w_scale = torch.rand(48, generator=generator) * 0.01 + 0.001
    y = quantkit.ops.int8_mixed_gemm(x, quantkit.ops.pack_w8a8(weight), w_scale, 48, threshold=6.0)
    exact = expected.astype(np.float64) @ (weight.double() * w_scale[:, None].double()).numpy().T
    np.testing.assert_allclose(y.numpy(), exact, rtol=1e-4, atol=1e-4)


def test_scales_come_back_to_the_bit() -> None:
    amax = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) * 4
    scale = amax / 127
    assert torch.equal(bnb.magnitudes(scale) / 127, scale)
    assert torch.equal(bnb.magnitudes(scale.bfloat16().float()) / 127, scale.bfloat16().float())
    some = torch.rand(100_000, generator=torch.Generator().manual_seed(1))
    assert float((bnb.magnitudes(some) / 127 / some - 1).abs().max()) <= 2.0**-23


def test_it_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By load, with the op's arithmetic, by inspect and by eval; close to the plain model."""
    output = written(tmp_path)
    tokens = torch.randint(3, 2048, (4, 64), generator=torch.Generator().manual_seed(0))
    model = quantkit.load(output, dtype=torch.float32)
    layer = model.model.layers[1].mlp.down_proj
    assert type(layer).__name__ == "Int8MixedLinear" and "from 6 on in 16 bit" in repr(layer)
    with Checkpoint(output) as checkpoint:
        read = WeightSource(checkpoint)
        assert read.schemes[Q].input_activations == replace(INT8_TOKEN, outlier_threshold=6.0)
        name = "model.layers.1.mlp.down_proj"
        x = torch.randn(5, 768) * 2.5
        assert bool((x.abs() >= 6).any())
        expected = read.input_quantizers[name](x).double() @ read.get(f"{name}.weight").double().t()
        with torch.inference_mode():
            torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4)
    found = inspect_folder(output, progress=False)
    assert "outliers from 6 on in 16 bit" in found.render() and len(found.linears) == 28
    assert 8.0 < found.bits_per_weight < 8.2
    text, report = tmp_path / "text.txt", tmp_path / "eval.json"
    lines = (EXAMPLES / "data" / "calibration.jsonl").read_text().splitlines()[:8]
    text.write_text("".join(json.loads(line)["text"] for line in lines))
    common = ["--text", str(text), "--windows", "4", "--window-length", "64", "--json", str(report)]
    for backend in ("dequantized", "quantkit"):
        baseline = ["--baseline", str(EXAMPLES / "models" / "tiny-llama"), "--backend", backend]
        assert main(["eval", str(output), *common, *baseline]) == 0
        assert 0 < json.loads(report.read_text())["perplexity"]["kl"] < 0.01
    assert check_folder(output, "transformers", hardware="cpu").ok
    assert "LLM.int8() from 6 on x28" in check_folder(output, "transformers").render()
    with torch.inference_mode():
        assert bool(model(tokens).logits.isfinite().all())


def test_conversions(tmp_path: Path) -> None:
    """The same codes go on as W8A8 and W8A16; activations that a target does not hold are refused unless told."""
    llm = written(tmp_path)
    with pytest.raises(ConfigError, match="which activations stay in 16 bit"):
        convert(llm, tmp_path / "no", "compressed-tensors", progress=False)
    w8a8 = convert(llm, tmp_path / "w8a8", "compressed-tensors", scheme="W8A8", progress=False)
    direct = quantize_by("tiny-llama", "{QuantizationModifier: {scheme: W8A8}}", tmp_path, "global.overwrite=true")
    one, two = load_file(w8a8 / "model.safetensors"), load_file(direct / "model.safetensors")
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)
    assert check_folder(w8a8, "vllm").ok
    # W8A8 itself is held: bitsandbytes with a threshold of 0; and there and back changes no byte.
    there = convert(w8a8, tmp_path / "there", "bitsandbytes", progress=False)
    assert json.loads((there / "config.json").read_text())["quantization_config"]["llm_int8_threshold"] == 0.0
    back = load_file(convert(there, tmp_path / "back", "compressed-tensors", progress=False) / "model.safetensors")
    assert back.keys() == one.keys() and all(torch.equal(one[n], back[n]) for n in one)
    w8a16 = quantize_by(
        "tiny-llama", "{QuantizationModifier: {scheme: W8A16_CHANNEL}}", tmp_path, "global.overwrite=true"
    )
    with pytest.raises(ConfigError, match="not scheme pack-quantized"):
        convert(w8a16, tmp_path / "no", "bitsandbytes", progress=False)
    again = convert(w8a16, tmp_path / "again", "bitsandbytes", scheme="LLM_INT8", progress=False)
    with Checkpoint(w8a16) as a, Checkpoint(again) as b:
        sources = WeightSource(a), WeightSource(b)
        for name in sources[0].modules:
            assert torch.equal(sources[0].get(f"{name}.weight"), sources[1].get(f"{name}.weight"))
    with pytest.raises(ConfigError, match="converting does not quantize anew"):
        convert(w8a16, tmp_path / "no", "compressed-tensors", scheme="W4A16", progress=False)
    with pytest.raises(ConfigError, match="its activations need data"):
        convert(w8a16, tmp_path / "no", "compressed-tensors", scheme="W8A8_STATIC", progress=False)
    with pytest.raises(CheckpointError, match="has values that BF16 does not hold"):
        convert(there, tmp_path / "no", "compressed-tensors", scheme="W8A16_CHANNEL", progress=False)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("scheme", ["W4A16", "W8A16", "FP8_DYNAMIC", "W8A8_STATIC", "W8A8_ASYM", "W8A16_CHANNEL"])
def test_other_schemes_are_refused(scheme: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="save_name 'bitsandbytes' holds symmetric int8"):
        bnb.check(preset(scheme))


def test_other_formats_and_experts_are_refused(tmp_path: Path) -> None:
    for name in ("compressed-tensors", "gptq", "awq", "fp8", "mindie"):
        with pytest.raises(ConfigError, match="LLM_INT8"):
            quantize_by("tiny-llama", RECIPE, tmp_path, f"compression.save_name={name}")
    with pytest.raises(ConfigError, match="experts as one 3-D parameter"):
        written(tmp_path, model="tiny-moe")
    output = written(tmp_path, model="tiny-moe", ignore="['re:.*experts.*']")
    assert check_folder(output, "transformers").ok
    with pytest.raises(ConfigError, match="goes with symmetric int8 per token"):
        QuantizationArgs(8, "int", strategy="tensor", outlier_threshold=6.0)


def test_the_check_finds_what_the_loader_trips_over(tmp_path: Path) -> None:
    output = written(tmp_path)
    config = json.loads((output / "config.json").read_text())
    tensors = load_file(output / "model.safetensors")

    def findings(block: dict[str, Any], changed: dict[str, Any]) -> str:
        now = {n: t for n, t in (tensors | changed).items() if t is not None}
        save_file(now, output / "model.safetensors", metadata={"format": "pt"})
        found = config | {"quantization_config": config["quantization_config"] | block}
        (output / "config.json").write_text(json.dumps(found))
        verdict = check_folder(output, "transformers")
        assert not verdict.ok
        return verdict.render()

    assert "is read as int8 unless" in findings({}, {f"{Q}.SCB": None, f"{Q}.weight": torch.zeros(256, 256)})
    assert "takes it out" in findings({"llm_int8_skip_modules": ["lm_head", "q_proj"]}, {})
    assert "is read as int8 unless" in findings({"llm_int8_skip_modules": []}, {})
    assert "its Linear needs [256]" in findings({}, {f"{Q}.SCB": torch.ones(3)})
    assert "is not 0" in findings({}, {f"{Q}.weight_format": torch.ones((), dtype=torch.uint8)})
    assert "checked is LLM.int8()" in findings({"load_in_8bit": False, "_load_in_8bit": False}, {})
    assert not check_folder(output, "vllm").ok
    for block in ({"load_in_4bit": True}, {"llm_int8_has_fp16_weight": True}, {"llm_int8_threshold": -1}):
        with pytest.raises(QuantkitError, match="quantization_config"):
            bnb.read_schemes(config["quantization_config"] | block)
