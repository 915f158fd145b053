"""FP8 in blocks as a source: values against an numpy decoder, whole jobs against those on the plain model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit import rounding
from quantkit.checkpoint.reader import Checkpoint
from quantkit.cli import main
from quantkit.errors import CheckpointError, PlanError
from quantkit.formats.fp8_source import Fp8Source, open_source

from ..e2e.jobs import EXAMPLES, quantize_by
from ..engine.tiny import make
from .test_compressed_tensors import e4m3

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
TABLE = np.array([np.nan if code & 127 == 127 else e4m3(code) for code in range(256)], dtype=np.float32)


def bf16(values: np.ndarray) -> torch.Tensor:
    """fp32 rounded to bf16, half to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return torch.from_numpy(rounded.view(np.int16)).view(torch.bfloat16)


def decoded(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    values = TABLE[codes.view(torch.uint8).numpy()]
    grid = scales.float().numpy().repeat(128, axis=-2).repeat(128, axis=-1)
    return bf16(values * grid[..., : values.shape[-2], : values.shape[-1]])


def plain_twin(source: Path, folder: Path) -> Path:
    """The bf16 model behind the FP8 checkpoint of one file in `source`."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(source / "model.safetensors")
    plain = {
        name: decoded(tensor, tensors[f"{name}_scale_inv"]) if f"{name}_scale_inv" in tensors else tensor
        for name, tensor in tensors.items()
        if not name.endswith("_scale_inv")
    }
    save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def coded(folder: Path, is_coded: Callable[[str], bool], **block: Any) -> Path:
    """Turns the model in `folder` into FP8 by hand: codes and scales at random, every finite code among them."""
    rng = np.random.default_rng(0)
    finite = np.array([code for code in range(256) if code & 127 != 127], dtype=np.uint8)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name, tensor in tensors.items() if tensor.dim() > 1 and is_coded(name)]:
        *experts, rows, cols = tensors[name].shape
        codes = rng.choice(finite, size=tuple(tensors[name].shape))
        scales = rng.uniform(1e-4, 2e-3, (*experts, -(-rows // 128), -(-cols // 128))).astype(np.float32)
        tensors[name] = torch.from_numpy(codes).view(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.from_numpy(scales)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {**FP8, **block}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama whose widths 128 does not divide, with the tokenizer of an embedded one."""
    folder = tmp_path_factory.mktemp("fp8") / "by-hand"
    make(folder, "llama", torch.bfloat16, hidden_size=160, intermediate_size=200, vocab_size=2048)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLES / "models" / "tiny-llama" / name, folder / name)
    return coded(folder, lambda name: "_proj" in name, modules_to_not_convert=["lm_head", "model.norm"])


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts that quantkit itself wrote."""
    folder = tmp_path_factory.mktemp("published")
    return quantize_by("tiny-moe", "{QuantizationModifier: {scheme: FP8_BLOCK}}", folder, "compression.save_name=fp8")


def same_weights(one: Path, other: Path) -> int:
    """How many tensors two outputs have in common, all of them with the same bytes; config.json too."""
    left, right = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and tensor.shape == right[name].shape, name
        assert torch.equal(tensor.view(-1).view(torch.uint8), right[name].view(-1).view(torch.uint8)), name
    configs = [json.loads((folder / "config.json").read_text()) for folder in (one, other)]
    for config in configs:
        config["quantization_config"]["ignore"].sort()  # in the order of the file
    assert configs[0] == configs[1]
    return len(left)


def test_values_names_and_dtypes_are_those_of_the_plain_model(by_hand: Path, tmp_path: Path) -> None:
    twin = load_file(plain_twin(by_hand, tmp_path / "twin") / "model.safetensors")
    with open_source(by_hand) as source:
        assert isinstance(source, Fp8Source) and len(source.dequantized) == 21
        assert "quantization_config" not in source.config
        assert source.tensors.keys() == twin.keys()
        assert source.total_bytes == sum(tensor.nbytes for tensor in twin.values())
        for name, tensor in twin.items():
            source.prefetch(name)
            found = source.tensor(name)
            assert (source.info(name).dtype, source.info(name).shape) == ("BF16", tuple(tensor.shape)), name
            assert torch.equal(found.view(torch.int16), tensor.view(torch.int16)), name
            source.release(name)
    with open_source(tmp_path / "twin") as source:
        assert type(source) is Checkpoint and not source.dequantized


RECIPES = {
    "int8": "{QuantizationModifier: {scheme: W8A8}}",
    "fp8, without a layer": "{QuantizationModifier: {scheme: FP8_DYNAMIC, ignore: [lm_head, 're:.*layers.1.*']}}",
    "int4": "{QuantizationModifier: {scheme: W4A16_CHANNEL_ASYM}}",
    "smoothquant, gptq": "{SmoothQuantModifier: {smoothing_strength: 0.6}, GPTQModifier: {scheme: W8A8}}",
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("model", ["by_hand", "published"])
def test_a_job_gives_the_same_as_on_the_plain_model(
    model: str, recipe: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source: Path = request.getfixturevalue(model)
    twin = plain_twin(source, tmp_path / "twin")
    outputs = []
    for folder in (source, twin):
        work = tmp_path / f"of {folder.name}"
        work.mkdir()
        outputs.append(quantize_by(str(folder), recipe, work, "dataset.num_samples=4", "dataset.max_seq_length=64"))
    assert same_weights(*outputs) > 30
    assert main(["audit", str(outputs[0]), "--source", str(source)]) == 0


def test_blocks_are_dequantized_in_parts_of_rows_too(
    by_hand: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for work in ("whole", "parts"):
        (tmp_path / work).mkdir()
        quantize_by(str(by_hand), RECIPES["int8"], tmp_path / work)
        monkeypatch.setattr(rounding, "PART", 1)  # 128 rows of 160 or 200
    assert same_weights(tmp_path / "whole" / "recipe", tmp_path / "parts" / "recipe") > 30


def test_experts_in_three_dimensions_stay_and_are_dequantized(tmp_path: Path) -> None:
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 1, "torch_dtype": "bfloat16"}
    folder = tmp_path / "stacked"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    names = ("mlp.experts.gate_up_proj", "self_attn.q_proj.weight")
    shapes = ((3, 130, 40), (128, 64))
    tensors = {f"model.layers.0.{n}": torch.zeros(s, dtype=torch.bfloat16) for n, s in zip(names, shapes, strict=True)}
    save_file(tensors, folder / "model.safetensors")
    coded(folder, lambda name: True)
    twin = plain_twin(folder, tmp_path / "twin")
    recipe = "{QuantizationModifier: {scheme: W8A8}}"
    for work in ("a", "b"):
        (tmp_path / work).mkdir()
    outputs = [quantize_by(str(f), recipe, tmp_path / w) for f, w in ((folder, "a"), (twin, "b"))]
    assert same_weights(*outputs) == 3
    kept = load_file(outputs[0] / "model.safetensors")["model.layers.0.mlp.experts.gate_up_proj"]
    assert kept.dtype == torch.bfloat16 and kept.shape == (3, 130, 40) and bool(kept.any())


Damage = Callable[[dict[str, torch.Tensor], dict[str, Any]], None]
NAME = "model.layers.1.mlp.up_proj.weight"


def _set(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return lambda tensors, block: tensors.update({name: value(tensors[name])})


def _without(name: str) -> Damage:
    def damage(tensors: dict[str, torch.Tensor], block: dict[str, Any]) -> None:
        del tensors[name]

    return damage


REFUSED: dict[str, tuple[Damage, str]] = {
    "no scales": (_without(f"{NAME}_scale_inv"), r"up_proj\.weight is F8_E4M3, and there is no"),
    "no codes": (_without(NAME), r"up_proj\.weight_scale_inv: there is no model\.layers\.1"),
    "grid": (_set(f"{NAME}_scale_inv", lambda s: s[:, :1].clone()), r"scale_inv is F32 \[2, 1\].* F32 \[2, 2\]"),
    "scales of another type": (_set(f"{NAME}_scale_inv", lambda s: s.int()), r"scale_inv is I32 \[2, 2\]"),
    "codes of another type": (_set(NAME, lambda w: w.view(torch.int8)), r"up_proj\.weight is I8 .* F8_E4M3"),
    "said to be plain": (
        lambda t, b: b.update(modules_to_not_convert=["model.layers.1.mlp"]),
        r"model\.layers\.1\.mlp\.down_proj\.weight is in FP8, and modules_to_not_convert .* 'model\.layers\.1\.mlp'",
    ),
    "a name for a list": (lambda t, b: b.update(modules_to_not_convert="lm_head"), "is a list of names"),
    "other codes": (lambda t, b: b.update(fmt="e5m2"), "fmt is 'e5m2'"),
    "other blocks": (lambda t, b: b.update(weight_block_size=[64, 64]), r"in blocks of 64 x 64 are F32 \[3, 4\]"),
    "hostile blocks": (lambda t, b: b.update(weight_block_size=[0, -1]), "weight_block_size is"),
    "static": (lambda t, b: b.update(activation_scheme="static"), "activation_scheme static"),
}


def damaged(source: Path, folder: Path, damage: Damage) -> Path:
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    damage(tensors, config["quantization_config"])
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("case", REFUSED)
def test_what_contradicts_itself_is_refused_from_headers(case: str, by_hand: Path, tmp_path: Path) -> None:
    damage, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=message):
        open_source(damaged(by_hand, tmp_path / "damaged", damage))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_is_refused(value: float, by_hand: Path, tmp_path: Path) -> None:
    def damage(scales: torch.Tensor) -> torch.Tensor:
        scales[1, 1] = value
        return scales

    folder = damaged(by_hand, tmp_path / "damaged", _set(f"{NAME}_scale_inv", damage))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight_scale_inv has NaN or Inf"):
        quantize_by(str(folder), RECIPES["int8"], tmp_path)
    assert not list(tmp_path.glob("*/*.safetensors.partial")) and not (tmp_path / "recipe").exists()


def test_a_code_that_is_nan_is_refused_with_its_row(by_hand: Path, tmp_path: Path) -> None:
    def damage(codes: torch.Tensor) -> torch.Tensor:
        codes.view(torch.uint8)[150, 3] = 0x7F
        return codes

    folder = damaged(by_hand, tmp_path / "damaged", _set(NAME, damage))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj: NaN or Inf in row 150 of 200"):
        quantize_by(str(folder), RECIPES["int8"], tmp_path)


def test_scales_in_bf16_and_as_powers_of_two(by_hand: Path, tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float8_e8m0fnu):
        folder = damaged(by_hand, tmp_path / str(dtype), _set(f"{NAME}_scale_inv", lambda s, d=dtype: s.to(d)))
        with open_source(folder) as source:
            tensors = load_file(folder / "model.safetensors")
            wanted = decoded(tensors[NAME], tensors[f"{NAME}_scale_inv"])
            assert torch.equal(source.tensor(NAME).view(torch.int16), wanted.view(torch.int16))


def test_torch_dtype_fp8_says_that_the_source_is_in_fp8(by_hand: Path, tmp_path: Path) -> None:
    quantize_by(str(by_hand), RECIPES["int8"], tmp_path, "model.torch_dtype=fp8")
    with pytest.raises(PlanError, match=r"torch_dtype: 'fp8', but .*tiny-llama is not in FP8"):
        quantize_by("tiny-llama", RECIPES["int8"], tmp_path / "..", "model.torch_dtype=fp8")
