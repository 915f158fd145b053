"""GPTQ, AWQ and block FP8 on disk: bytes decoded by independent numpy decoders, whole jobs, labels that lie."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.checkpoint.reader import Checkpoint
from quantkit.config.groups import SchemeGroup
from quantkit.config.presets import PRESETS
from quantkit.config.schemes import QuantizationScheme
from quantkit.conformance import check_folder
from quantkit.errors import CheckpointError, ConfigError
from quantkit.formats import FORMATS, format_by_name
from quantkit.formats.source import WeightSource
from quantkit.modifiers.rtn import quantize_weight
from quantkit.quantized import QuantizedTensor

from ..e2e.jobs import EXAMPLES, quantize_by
from .test_compressed_tensors import e4m3

ROWS, COLS = 24, 256
AWQ_NIBBLE = {0: 0, 1: 4, 2: 1, 3: 5, 4: 2, 5: 6, 6: 3, 7: 7}  # output within a word -> its nibble


def field(word: np.uint32, index: int, bits: int) -> int:
    return (int(word) >> (index * bits)) % 2**bits


def decode_gptq(t: dict[str, torch.Tensor], bits: int, version: int) -> np.ndarray:
    """W[n, k] = (q - z) * s[g_idx[k], n], q packed along k, z along n; version 1 stores z - 1 in each field."""
    q, z = (t[f"m.{name}"].numpy().view(np.uint32) for name in ("qweight", "qzeros"))
    scales, g_idx, each = t["m.scales"].numpy().astype(np.float64), t["m.g_idx"].numpy(), 32 // bits
    rows, cols = q.shape[1], q.shape[0] * each
    weight = np.empty((rows, cols))
    for n in range(rows):
        for k in range(cols):
            zero = field(z[g_idx[k], n // each], n % each, bits) + (1 if version == 1 else 0)
            weight[n, k] = (field(q[k // each, n], k % each, bits) - zero) * scales[g_idx[k], n]
    return weight


def decode_awq(t: dict[str, torch.Tensor], group: int) -> np.ndarray:
    q, z = (t[f"m.{name}"].numpy().view(np.uint32) for name in ("qweight", "qzeros"))
    scales = t["m.scales"].numpy().astype(np.float64)
    cols, rows = q.shape[0], q.shape[1] * 8
    weight = np.empty((rows, cols))
    for n in range(rows):
        nibble = AWQ_NIBBLE[n % 8]
        for k in range(cols):
            zero = field(z[k // group, n // 8], nibble, 4)
            weight[n, k] = (field(q[k, n // 8], nibble, 4) - zero) * scales[k // group, n]
    return weight


def decode_fp8(t: dict[str, torch.Tensor]) -> np.ndarray:
    codes, scale = t["m.weight"].view(torch.uint8).numpy(), t["m.weight_scale_inv"].numpy().astype(np.float64)
    values = np.vectorize(e4m3)(codes)
    return values * scale.repeat(128, 0)[: values.shape[0]].repeat(128, 1)[:, : values.shape[1]]


def made(scheme: QuantizationScheme, name: str, rows: int = ROWS) -> tuple[QuantizedTensor, dict[str, torch.Tensor]]:
    """A random weight quantized for format `name`, and its tensors, which are those that the plan foresees."""
    fmt = format_by_name(name)
    fmt.check(scheme)
    weight = (torch.randn(rows, COLS, generator=torch.Generator().manual_seed(5)) * 0.05).bfloat16()
    weight[3] = 0
    dtype = {"F16": torch.float16, "F32": torch.float32}[fmt.scale_dtype(scheme, "BF16")]
    quantized = quantize_weight("m", weight, scheme.weights, scale_dtype=dtype, pack=fmt.packs(scheme))
    tensors = fmt.pack_weight("m", quantized, dtype)
    planned = {
        t.name: tuple(t.shape) for t in fmt.stored_tensors("m", scheme, rows, COLS, "BF16") if "input" not in t.name
    }
    assert {name: tuple(t.shape) for name, t in tensors.items()} == planned
    assert {f"m.{part}" for part in fmt.PARTS} >= set(planned)
    return quantized, tensors


def reread(name: str, scheme: QuantizationScheme, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the format's reader makes of `tensors` and the config block of `scheme`."""
    fmt = format_by_name(name)
    block = json.loads(json.dumps(fmt.config_block([SchemeGroup(("Linear",), scheme)], ["lm_head"], [])))
    assert block["quant_method"] == name
    assert fmt.quantized_modules(tensors) == ["m"]
    read, get = fmt.read_schemes(block)("m"), tensors.__getitem__
    return fmt.load_weight("m", read, get, *fmt.shape("m", read, get)).dequantize()


@pytest.mark.parametrize("preset", ["W4A16", "W8A16", "W4A16_CHANNEL", "W8A16_CHANNEL", "W4A16_ASYM", "W8A16_ASYM"])
def test_gptq_bytes(preset: str) -> None:
    scheme = PRESETS[preset]
    quantized, tensors = made(scheme, "gptq")
    weight = decode_gptq(tensors, scheme.weights.num_bits, 1 if scheme.weights.symmetric else 2)
    assert np.array_equal(weight.astype(np.float32), quantized.dequantize().numpy())
    assert torch.equal(reread("gptq", scheme, tensors), quantized.dequantize())


def test_gptq_in_order() -> None:
    scheme = replace(PRESETS["W4A16"], weights=replace(PRESETS["W4A16"].weights, group_size=32, actorder="group"))
    quantized, _ = made(scheme, "gptq")
    g_idx = (torch.arange(COLS, dtype=torch.int32) // 32)[
        torch.randperm(COLS, generator=torch.Generator().manual_seed(1))
    ]
    ordered = replace(quantized, g_idx=g_idx)
    tensors = format_by_name("gptq").pack_weight("m", ordered, torch.float16)
    assert torch.equal(tensors["m.g_idx"], g_idx)
    assert np.array_equal(decode_gptq(tensors, 4, 1).astype(np.float32), ordered.dequantize().numpy())
    assert torch.equal(reread("gptq", scheme, tensors), ordered.dequantize())
    block = format_by_name("gptq").config_block(
        [SchemeGroup(("Linear",), scheme)], ["lm_head", "model.layers.0.mlp.up_proj"], []
    )
    assert block["desc_act"] is True
    assert block["dynamic"] == {r"-:^model\.layers\.0\.mlp\.up_proj$": {}}


@pytest.mark.parametrize("preset", ["W4A16", "W4A16_ASYM", "W4A16_CHANNEL_ASYM"])
def test_awq_bytes(preset: str) -> None:
    scheme = PRESETS[preset]
    quantized, tensors = made(scheme, "awq")
    weight = decode_awq(tensors, scheme.weights.group_size or COLS)
    assert np.array_equal(weight.astype(np.float32), quantized.dequantize().numpy())
    assert torch.equal(reread("awq", scheme, tensors), quantized.dequantize())


@pytest.mark.parametrize("rows", [128, 200])
def test_fp8_blocks_bytes(rows: int) -> None:
    quantized, tensors = made(PRESETS["FP8_BLOCK"], "fp8", rows)
    assert np.array_equal(decode_fp8(tensors).astype(np.float32), quantized.dequantize().numpy())
    assert torch.equal(reread("fp8", PRESETS["FP8_BLOCK"], tensors), quantized.dequantize())


@pytest.mark.parametrize("label", ["gptq", "gptq_v2"])
def test_a_label_of_the_other_version_is_refused(label: str) -> None:
    scheme = PRESETS["W4A16"]
    _, tensors = made(scheme, "gptq")
    fmt = format_by_name("gptq")
    block = fmt.config_block([SchemeGroup(("Linear",), scheme)], [], [])
    if label == "gptq":  # zero points of version 2 under the label of version 1
        tensors["m.qzeros"] = torch.full_like(tensors["m.qzeros"], 0x88888888 - (1 << 32))
    else:
        block |= {"format": label, "checkpoint_format": label}
    read = fmt.read_schemes(block)("m")
    with pytest.raises(CheckpointError, match=r"m\.qzeros: .* may be that of the other version"):
        fmt.load_weight("m", read, tensors.__getitem__, ROWS, COLS)


MISFITS = {"gptq": ("W8A8", "FP8"), "awq": ("W8A16", "W4A8"), "fp8": ("FP8_DYNAMIC", "W4A16")}


def test_what_does_not_fit_is_refused() -> None:
    for name, preset in ((name, preset) for name, presets in MISFITS.items() for preset in presets):
        with pytest.raises(ConfigError, match=rf"save_name '{name}' holds .* use save_name 'compressed-tensors'"):
            format_by_name(name).check(PRESETS[preset])
    for name in ("gptq", "awq"):
        with pytest.raises(ConfigError, match=r"m: 20 (x 256|outputs)"):
            format_by_name(name).stored_tensors("m", PRESETS["W4A16"], 20, COLS, "BF16")
        two = [SchemeGroup((t,), PRESETS["W4A16"]) for t in ("a", "b")]
        with pytest.raises(ConfigError, match="one scheme, not 2"):
            format_by_name(name).config_block(two, [], [])
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    for block, words in (
        ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "bits 3"),
        ({"quant_method": "gptq", "bits": 4}, "no group_size"),
        ({**gptq, "checkpoint_format": "marlin"}, "marlin"),
        ({**gptq, "dynamic": {"+:.*": {"bits": 3}}}, "'\\+:.*bits 3"),
        ({**gptq, "dynamic": {"(": {}}}, r"dynamic '\(' is no pattern"),
        ({**gptq, "dynamic": {"a": None}}, "dynamic 'a' is None"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_scale_semantics": "inverse"}, "divides"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}, "gemv"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128]}, r"\[128\]"),
    ):
        with pytest.raises(CheckpointError, match=words):
            FORMATS[str(block["quant_method"])].read_schemes(block)


JOBS = {
    "gptq": "{GPTQModifier: {scheme: W4A16}}",
    "gptq, int8": "{QuantizationModifier: {scheme: W8A16}}",
    "gptq, in order": "{GPTQModifier: {scheme: W4A16, actorder: group}}",
    "gptq, asymmetric": "{QuantizationModifier: {scheme: W4A16_ASYM}}",
    "gptq, some layers": "{QuantizationModifier: {scheme: W4A16, ignore: [o_proj]}}",
    "awq": "{AWQModifier: {scheme: W4A16_ASYM}}",
    "awq, symmetric": "{QuantizationModifier: {scheme: W4A16}}",
    "fp8": "{QuantizationModifier: {scheme: FP8_BLOCK}}",
}


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("model", ["tiny-llama", "tiny-moe"])
def test_a_job_writes_it(model: str, job: str, tmp_path: Path) -> None:
    """The run's own audit passes, servers take it, and the weights are as close as compressed-tensors' are."""
    name = job.partition(",")[0]
    output = quantize_by(model, JOBS[job], tmp_path, f"compression.save_name={name}")
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == name
    assert (output / "quantize_config.json").exists() is (name == "gptq")
    for client in ("vllm", "sglang", "transformers"):
        verdict = check_folder(output, client)
        # tiny-moe's keys have 64 outputs, half a block, and are fused with others.
        half = (model, name) == ("tiny-moe", "fp8")
        vllm_not = client == "vllm" and job in ("gptq, asymmetric", "gptq, in order")
        assert verdict.ok is not (half or vllm_not), verdict.render()
    with Checkpoint(output) as checkpoint:
        weights = WeightSource(checkpoint)
        with Checkpoint(EXAMPLES / "models" / model) as source:
            assert weights.names() == set(source.tensors)
        assert all(weights.get(f"{module}.weight").isfinite().all() for module in weights.modules)
        assert ("o_proj" in str(weights.modules)) is (job != "gptq, some layers")


def test_a_missing_part_is_refused(tmp_path: Path) -> None:
    output = quantize_by("tiny-llama", JOBS["awq"], tmp_path, "compression.save_name=awq")
    tensors = load_file(output / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.qzeros")
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    with (
        Checkpoint(output) as checkpoint,
        pytest.raises(CheckpointError, match=r"no tensor 'model.layers.1.mlp.up_proj.qzeros'"),
    ):
        WeightSource(checkpoint).get("model.layers.1.mlp.up_proj.weight")
