"""`quantkit convert` there and back gives the same bytes; `quantkit inspect` tells what is in a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.checkpoint.reader import Checkpoint
from quantkit.cli import main
from quantkit.conformance import check_folder
from quantkit.convert import convert
from quantkit.errors import CheckpointError, ConfigError
from quantkit.formats.source import WeightSource
from quantkit.inspection import inspect_folder

from ..e2e.jobs import EXAMPLES, quantize_by


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor as a plain checkpoint has it."""
    with Checkpoint(folder) as checkpoint:
        read = WeightSource(checkpoint)
        return {name: read.get(name).clone() for name in sorted(read.names())}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# modifiers, first format, the formats that it goes to
PATHS = {
    "int4": ("{QuantizationModifier: {scheme: W4A16}}", "compressed-tensors", ("gptq", "awq")),
    "int4 from awq": ("{QuantizationModifier: {scheme: W4A16_ASYM}}", "awq", ("gptq",)),
    "int4 by gptq": ("{GPTQModifier: {scheme: W4A16}}", "compressed-tensors", ("gptq", "awq")),
    "int4 in order": ("{GPTQModifier: {scheme: W4A16, actorder: group}}", "compressed-tensors", ("gptq",)),
    "int4 asymmetric": ("{QuantizationModifier: {scheme: W4A16_ASYM}}", "compressed-tensors", ("gptq", "awq")),
    "int8, some layers": ("{QuantizationModifier: {scheme: W8A16, ignore: [o_proj]}}", "compressed-tensors", ("gptq",)),
    "fp8 blocks": ("{QuantizationModifier: {scheme: FP8_BLOCK}}", "compressed-tensors", ("fp8",)),
    "fp8, static": ("{QuantizationModifier: {scheme: FP8}}", "compressed-tensors", ("fp8",)),
}


@pytest.mark.parametrize("path", PATHS)
def test_there_and_back(path: str, tmp_path: Path) -> None:
    modifiers, first, others = PATHS[path]
    job = quantize_by("tiny-llama", modifiers, tmp_path, f"compression.save_name={first}")
    expected = weights(job)
    previous = job
    for name in others:
        previous = convert(previous, tmp_path / name, name, progress=False)
        assert same(weights(previous), expected), name
        assert json.loads((previous / "config.json").read_text())["quantization_config"]["quant_method"] == name
        with Checkpoint(EXAMPLES / "models" / "tiny-llama") as source:
            assert {path.name for path in source.side_files} <= {path.name for path in previous.iterdir()}
    back = convert(previous, tmp_path / "back", first, progress=False)
    written, original = load_file(back / "model.safetensors"), load_file(job / "model.safetensors")
    assert same(written, original)
    assert check_folder(back, "vllm").ok == check_folder(job, "vllm").ok


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq", "awq"])
def test_a_weight_is_read_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales and zero points, which are looked at before, are read without the codes."""
    job = quantize_by(
        "tiny-llama", "{QuantizationModifier: {scheme: W4A16_ASYM}}", tmp_path, f"compression.save_name={name}"
    )
    read: list[str] = []
    tensor = Checkpoint.tensor

    def noted(self: Checkpoint, name: str, populate: bool = True) -> torch.Tensor:
        if populate and name.endswith(("qweight", "weight_packed")):
            read.append(name)
        return tensor(self, name, populate)

    monkeypatch.setattr(Checkpoint, "tensor", noted)
    convert(job, tmp_path / "out", "gptq", progress=False)
    # For its codes, and in GPTQ's and AWQ's formats right before for its shape.
    once = [n for i, n in enumerate(read) if i == 0 or read[i - 1] != n]
    assert len(once) == len(set(once)) == 28 and len(read) <= 56


def test_what_would_be_lost_is_refused(tmp_path: Path) -> None:
    int4 = quantize_by("tiny-llama", PATHS["int4"][0], tmp_path, "compression.save_name=gptq")
    with pytest.raises(ConfigError, match="save_name 'fp8' holds FP8"):
        convert(int4, tmp_path / "no", "fp8")
    with pytest.raises(ConfigError, match="did you mean 'gptq'"):
        convert(int4, tmp_path / "no", "gptqq")
    with pytest.raises(CheckpointError, match="not quantized"):
        convert(EXAMPLES / "models" / "tiny-llama", tmp_path / "no", "gptq")
    # fp16 scales, which a bf16 model's compressed-tensors reader would round.
    with pytest.raises(CheckpointError, match=r"scales: has values that BF16 does not hold"):
        convert(int4, tmp_path / "no", "compressed-tensors")
    # Groups in an order that the label does not tell of.
    tensors = load_file(int4 / "model.safetensors")
    name = next(name for name in tensors if name.endswith("down_proj.g_idx"))
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, int4 / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="order of their own"):
        convert(int4, tmp_path / "no", "awq")
    assert not (tmp_path / "no").exists() and not list(tmp_path.glob("no*"))


@pytest.mark.parametrize("first", ["compressed-tensors", "mindie"])
def test_static_inputs_of_mindie_are_its_own(first: str, tmp_path: Path) -> None:
    """Weights go over with dynamic inputs."""
    made = quantize_by(
        "tiny-llama", "{QuantizationModifier: {scheme: W8A8_STATIC_ASYM}}", tmp_path, f"compression.save_name={first}"
    )
    for name in {"compressed-tensors": ("mindie",), "mindie": ("compressed-tensors", "mindie")}[first]:
        with pytest.raises(ConfigError, match="static inputs: mindie rounds their scales"):
            convert(made, tmp_path / "no", name, progress=False)
        assert not (tmp_path / "no").exists()
        dynamic = convert(made, tmp_path / f"to-{name}", name, scheme="W8A8", progress=False)
        assert same(weights(dynamic), weights(made))
        assert json.loads((dynamic / "config.json").read_text()).get("quantize") == (
            "w8a8_dynamic" if name == "mindie" else None
        )
        client = "mindie" if name == "mindie" else "vllm"
        assert check_folder(dynamic, client).ok, check_folder(dynamic, client).render()
        assert inspect_folder(dynamic, progress=False).render()


def test_kv_cache_scales_go_along_or_are_refused(tmp_path: Path) -> None:
    job = quantize_by("tiny-llama", "{QuantizationModifier: {scheme: FP8, kv_cache_scheme: fp8}}", tmp_path)
    there = convert(job, tmp_path / "fp8", "fp8", progress=False)
    back = convert(there, tmp_path / "back", "compressed-tensors", progress=False)
    assert same(load_file(back / "model.safetensors"), load_file(job / "model.safetensors"))
    int4 = quantize_by(
        "tiny-llama", "{QuantizationModifier: {scheme: W4A16, kv_cache_scheme: fp8}}", tmp_path, "global.overwrite=true"
    )
    with pytest.raises(ConfigError, match="no place for KV-cache scales"):
        convert(int4, tmp_path / "no", "gptq")


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq", "awq"])
def test_inspect(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = "{QuantizationModifier: {scheme: W4A16_ASYM, ignore: ['re:.*layers.0.mlp.*']}}"
    folder = quantize_by("tiny-llama", recipe, tmp_path, f"compression.save_name={name}")
    found = inspect_folder(folder, progress=False)
    assert len(found.linears) == 25 and found.method == name and len(found.schemes) == 1
    assert len([kept for kept in found.kept if "layers.0.mlp" in kept]) == 3
    with Checkpoint(folder) as checkpoint:
        read = WeightSource(checkpoint)
        stored = {n for module in read.modules for n in read.stored(module)}
        nbytes = sum(checkpoint.tensors[n].nbytes for n in stored)
        assert found.other_bytes == checkpoint.total_bytes - nbytes
        count = sum(rows * cols for rows, cols in map(read.shape, read.modules))
        assert found.bits_per_weight == pytest.approx(8 * nbytes / count)
        one = read.quantized("model.layers.2.mlp.up_proj")
    facts = next(f for f in found.linears if f.module == "model.layers.2.mlp.up_proj")
    assert (facts.rows, facts.cols, facts.negative, facts.outlier_rows) == (768, 256, 0, ())
    assert facts.scale_max == float(one.scale.max()) and facts.scale_min == float(one.scale.min())
    codes = one.unpacked()
    assert facts.at_ends == pytest.approx(float(((codes == -8) | (codes == 7)).float().mean()))
    report = tmp_path / "facts.json"
    assert main(["inspect", str(folder), "--json", str(report)]) == 0
    assert "asymmetric" in capsys.readouterr().out
    assert json.loads(report.read_text())["linears"][0]["module"] == found.linears[0].module


def test_inspect_finds_outliers_and_plain_models(tmp_path: Path) -> None:
    assert "not quantized" in inspect_folder(EXAMPLES / "models" / "tiny-llama", progress=False).render()
    folder = quantize_by("tiny-llama", "{QuantizationModifier: {scheme: W8A8}}", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight_scale"][5] *= 300
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = inspect_folder(folder, progress=False)
    facts = next(f for f in found.linears if f.module == "model.layers.1.mlp.up_proj")
    assert facts.outlier_rows == (5,) and "up_proj: scales up to" in found.render()
