"""Experts stored as one tensor for a layer: quantized as if each were stored by itself, and named so in the output."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantkit
from quantkit import engine
from quantkit.audit import audit
from quantkit.calibrate import calibrate
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.writer import CheckpointWriter
from quantkit.config.presets import PRESETS, int_weights
from quantkit.config.recipe import AWQModifier, GPTQModifier, Modifier, QuantizationModifier, Recipe
from quantkit.config.run_config import CompressionConfig, DatasetConfig, GlobalConfig, ModelConfig, RunConfig
from quantkit.config.schemes import QuantizationScheme
from quantkit.conformance import check_folder
from quantkit.errors import CheckpointError
from quantkit.evaluate import open_source as open_quantized
from quantkit.formats.fp8_source import open_source
from quantkit.formats.source import WeightSource
from quantkit.formats.stacked_source import StackedSource
from quantkit.models.families import family_of
from quantkit.models.skeleton import Skeleton
from quantkit.models.stacked_experts import UNREAD, Part, parts_of

from .stacked import STACKED, by_expert, filled, stack, twin

# Groups of 128 and blocks of 128 x 128 need as much.
WIDE = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32}
OWN: dict[str, dict[str, Any]] = {
    "llama4_text": {"moe_layers": [0, 1], "no_rope_layers": [1, 0]},
    "qwen3_vl_moe_text": {
        "moe_intermediate_size": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 4, 4]},
    },
    "qwen3_5_moe_text": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_value_head_dim": 32,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 128,
    },
}
INT4 = QuantizationScheme("int4", int_weights(4, 32))
E = "model.layers.0.mlp.experts"


def job(folder: Path, model: Path, *modifiers: Modifier) -> RunConfig:
    return RunConfig(
        GlobalConfig(save_path=str(folder)),
        ModelConfig(str(model)),
        CompressionConfig(recipe=Recipe(modifiers)),
        DatasetConfig(data_path="rows"),
        source=folder,
        stem="out",
    )


def rows() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 128, (48 - i % 3,), generator=generator).tolist() for i in range(16)]


def run(folder: Path, model: Path, *modifiers: Modifier) -> Path:
    result = engine.run(job(folder, model, *modifiers), rows=rows(), progress=False)
    assert result.audit.ok, result.audit.render()
    return result.output


def tensors(folder: Path) -> dict[str, bytes]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(
            {n: t.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes() for n, t in load_file(file).items()}
        )
    return found


def plain(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a quantized checkpoint by its plain name, dequantized."""
    source: Any = open_quantized(folder)
    return {name: source.get(name).clone() for name in source.names()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Of each family a stacked model and its twin."""
    found = {}
    for name in STACKED:
        folder = tmp_path_factory.mktemp(name)
        model = stack(folder / "stacked", name, dtype=torch.bfloat16, **WIDE, **OWN.get(name, {}))
        twin(folder / "stacked", folder / "twin", model)
        found[name] = folder / "stacked", folder / "twin"
    return found


def test_shapes_tell_whether_matrices_are_transposed() -> None:
    family = family_of({"model_type": "qwen3_vl_moe_text", "num_hidden_layers": 1})
    for both, down, transposed in (((4, 48, 24), (4, 24, 24), False), ((4, 24, 48), (4, 24, 24), True)):
        found = parts_of(family, {f"{E}.down_proj": down, f"{E}.gate_up_proj": both})
        assert list(found) == [f"{E}.down_proj", f"{E}.gate_up_proj"]
        parts = found[f"{E}.gate_up_proj"]
        assert list(parts)[:3] == [f"{E}.0.gate_proj.weight", f"{E}.0.up_proj.weight", f"{E}.1.gate_proj.weight"]
        assert parts[f"{E}.3.up_proj.weight"] == Part(f"{E}.gate_up_proj", 3, slice(24, 48), transposed, (24, 24))
        assert parts[f"{E}.3.up_proj.weight"].run is not transposed


@pytest.mark.parametrize(
    ("both", "down", "more"),
    [
        ((4, 48, 16), (4, 16, 23), {}),
        ((4, 48, 16), (3, 16, 24), {}),
        ((4, 48), (4, 16, 24), {}),
        ((0, 48, 16), (0, 16, 24), {}),
        ((4, 48, 16), (4, 16, 24), {f"{E}.gate_up_proj_bias": (4, 48)}),
        ((4, 48, 16), (4, 16, 24), {f"{E}.gate_up_proj_bias": (4, 48), f"{E}.down_proj_bias": (4, 24)}),
    ],
)
def test_what_does_not_fit_together_stays_as_it_is(both: Any, down: Any, more: Any) -> None:
    family = family_of({"model_type": "gpt_oss", "num_hidden_layers": 1})
    assert parts_of(family, {f"{E}.gate_up_proj": both, f"{E}.down_proj": down, **more}) == {}


def test_other_families_and_layers_behind_the_last_stay_as_they_are() -> None:
    shapes = {f"{E}.gate_up_proj": (4, 48, 16), f"{E}.down_proj": (4, 16, 24)}
    for model_type, layer in (("qwen3_moe", 0), ("something_new", 0), ("gpt_oss", 1)):
        family = family_of({"model_type": model_type, "num_hidden_layers": 1})
        renamed = {name.replace("layers.0", f"layers.{layer}"): shape for name, shape in shapes.items()}
        assert parts_of(family, renamed) == {}


@pytest.mark.parametrize("model_type", STACKED)
def test_each_expert_is_what_transformers_computes_with(model_type: str, tmp_path: Path) -> None:
    model = stack(tmp_path, model_type)
    with open_source(tmp_path) as source:
        assert isinstance(source, StackedSource)
        seen = 0
        for path, module in model.named_modules():
            if path.endswith(".experts"):
                for name, tensor in by_expert(module).items():
                    found = source.tensor(f"{path}.{name}")
                    assert torch.equal(found, tensor) and found.is_contiguous()
                    assert source.info(f"{path}.{name}").shape == tuple(tensor.shape)
                    seen += 1
        assert seen == sum(".experts." in name for name in source.tensors) > 0


SCHEMES = ["W8A8", "FP8_DYNAMIC", "FP8_BLOCK", "W4A16", "W4A16_ASYM", "MXFP4", "MXFP8", "NVFP4A16"]


@pytest.mark.parametrize("model_type", STACKED)
def test_rounding_gives_the_bytes_of_experts_stored_by_themselves(
    model_type: str, models: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    stacked, apart = models[model_type]
    for scheme in SCHEMES:
        modifier = QuantizationModifier(scheme=PRESETS[scheme], ignore=["lm_head"])
        found = [run(tmp_path / f"{scheme}-{i}", model, modifier) for i, model in enumerate((stacked, apart))]
        assert tensors(found[0]) == tensors(found[1])
        blocks = [json.loads((f / "config.json").read_text())["quantization_config"] for f in found]
        assert blocks[0] == blocks[1]
        with Checkpoint(found[0]) as written:
            assert not any(".experts.gate_up" in name for name in written.tensors)


@pytest.mark.parametrize("model_type", STACKED)
@pytest.mark.parametrize("kind", [GPTQModifier, AWQModifier])
def test_calibration_gives_what_it_gives_of_experts_stored_by_themselves(
    model_type: str, kind: Any, models: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    ignore = ["lm_head"]
    recipe = [AWQModifier(), QuantizationModifier(scheme=INT4, ignore=ignore)]
    if kind is GPTQModifier:
        recipe = [GPTQModifier(scheme=INT4, ignore=ignore)]
    found = [run(tmp_path / str(i), model, *recipe) for i, model in enumerate(models[model_type])]
    assert tensors(found[0]) == tensors(found[1])


@pytest.mark.parametrize("model_type", STACKED)
@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "W4A16"])
def test_the_loaded_model_computes_with_the_dequantized_weights(model_type: str, scheme: str, tmp_path: Path) -> None:
    model = stack(tmp_path / "model", model_type, **WIDE, **OWN.get(model_type, {}))
    weights_only = QuantizationScheme(scheme, PRESETS[scheme].weights)
    modifier: Modifier = GPTQModifier(scheme=INT4) if scheme == "W4A16" else QuantizationModifier(scheme=weights_only)
    output = run(tmp_path, tmp_path / "model", modifier)
    ids = torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact = filled(model, plain(output)).double()
        exact.set_experts_implementation("eager")
        wanted = exact(ids).logits
        found = quantkit.load(output)(ids).logits
    assert float((found - wanted).norm() / wanted.norm()) < 1e-4


@pytest.mark.parametrize("model_type", STACKED)
def test_experts_that_are_left_out_stay_stacked(
    model_type: str, models: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """But for Llama 4, whose experts Transformers reads each by itself where anything is quantized."""
    stacked, apart = models[model_type]
    ignore = ["lm_head", "re:.*experts.*"]
    before, seen = load_file((apart if model_type == "llama4_text" else stacked) / "model.safetensors"), []
    for name, modifier in (
        ("rounded", QuantizationModifier(scheme=PRESETS["W8A8"], ignore=ignore)),
        ("gptq", GPTQModifier(scheme=INT4, ignore=ignore)),
    ):
        output = run(tmp_path / name, stacked, modifier)
        after = load_file(output / "model.safetensors")
        kept = [n for n in before if ".experts." in n]
        assert kept and all(torch.equal(before[n], after[n]) for n in kept)
        block = json.loads((output / "config.json").read_text())["quantization_config"]
        assert any(n.endswith("experts.0.gate_proj") for n in block["ignore"])
        ids = torch.randint(0, 128, (1, 16))
        loaded = quantkit.load(output)
        with torch.no_grad():
            assert bool(loaded(ids).logits.isfinite().all())
        loaded.save_pretrained(tmp_path / f"{name} copy")
        assert tensors(tmp_path / f"{name} copy") == tensors(output)
        seen.append(output)
    with open_source(stacked) as source:
        assert all(audit(output, source, progress=False).ok for output in seen)


def test_fp8_sources_are_dequantized_expert_by_expert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes [experts, out, in] with scales of 128 x 128 blocks: each expert is the part of the whole."""
    model = stack(tmp_path / "plain", "qwen3_5_moe_text", **WIDE, **OWN["qwen3_5_moe_text"])
    stored = load_file(tmp_path / "plain" / "model.safetensors")
    wanted = dict(stored)
    for name in [name for name in stored if ".experts." in name]:
        values = stored.pop(name)
        count, rows, cols = values.shape
        blocks = values.reshape(count, rows // 128, 128, cols // 128, 128)
        scale = blocks.abs().amax((2, 4)) / 448
        grid = scale.repeat_interleave(128, 1).repeat_interleave(128, 2)
        codes = (values / grid).to(torch.float8_e4m3fn)
        stored |= {name: codes, f"{name}_scale_inv": scale}
        wanted[name] = codes.float() * grid
    folder = tmp_path / "fp8"
    folder.mkdir()
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(stored, folder / "model.safetensors")
    with open_source(folder) as source:
        monkeypatch.setattr(type(source._stored), "tensor", None)  # never all experts at once
        inside = {n: t for p, m in filled_with(model, wanted).named_modules() for n, t in named(p, m)}
        assert inside and all(torch.equal(source.tensor(name), tensor) for name, tensor in inside.items())
    monkeypatch.undo()
    output = run(tmp_path, folder, QuantizationModifier(scheme=PRESETS["W8A8"], ignore=["lm_head"]))
    assert any("experts.3.down_proj.weight_scale" in name for name in tensors(output))


def filled_with(model: Any, stacked: dict[str, Tensor]) -> Any:
    model.load_state_dict({**model.state_dict(), **{n: t for n, t in stacked.items() if ".experts." in n}})
    return model


def named(path: str, module: Any) -> list[tuple[str, Tensor]]:
    found = by_expert(module) if path.endswith(".experts") else {}
    return [(f"{path}.{name}", tensor) for name, tensor in found.items()]


@pytest.mark.parametrize("model_type", STACKED)
def test_the_checker_says_who_leaves_quantized_experts_out(model_type: str, tmp_path: Path) -> None:
    """Transformers is asked; what vLLM and SGLang read of gpt-oss is by their loaders' code."""
    from transformers import AutoModelForCausalLM

    stack(tmp_path / "model", model_type, **WIDE, **OWN.get(model_type, {}))
    output = run(tmp_path, tmp_path / "model", QuantizationModifier(scheme=PRESETS["W4A16"]))
    without = QuantizationModifier(scheme=PRESETS["W4A16"], ignore=["lm_head", "re:.*experts.*"])
    kept = run(tmp_path / "kept", tmp_path / "model", without)
    for client in ("vllm", "sglang", "transformers"):
        assert check_folder(kept, client).ok
        unread = client in UNREAD.get(model_type, ())
        verdict = check_folder(output, client)
        assert any("is left out" in finding.rule for finding in verdict.findings) is unread
        assert verdict.ok is not unread
    if model_type == "qwen3_vl_moe_text":  # has no class for a text part alone; see test_vision_language.py
        return
    ids = torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(1))
    for folder, read in ((output, "transformers" not in UNREAD.get(model_type, ())), (kept, True)):
        with torch.no_grad():
            theirs: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
            theirs.set_experts_implementation("eager")
            found, ours = theirs(ids).logits, quantkit.load(folder)(ids).logits
        apart = float((found - ours).norm() / ours.norm())
        assert apart < 1e-4 if read else apart > 0.5


def test_saved_statistics_are_those_of_the_stacked_model(models: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """Also for a recipe that leaves experts stacked in its output."""
    stacked, _ = models["qwen3_5_moe_text"]
    recipe = GPTQModifier(scheme=INT4, ignore=["lm_head"])
    direct = run(tmp_path / "direct", stacked, recipe)
    saved = calibrate(job(tmp_path, stacked, recipe), tmp_path / "statistics", rows=rows(), progress=False)
    for ignore in (["lm_head"], ["lm_head", "re:.*experts.*"]):
        config = job(tmp_path / str(len(ignore)), stacked, GPTQModifier(scheme=INT4, ignore=ignore))
        result = engine.run(config, statistics=saved, progress=False)
        assert result.audit.ok, result.audit.render()
        kept = any(".experts.gate_up" in name for name in tensors(result.output))
        assert kept is (len(ignore) > 1)
        if not kept:
            assert tensors(result.output).keys() == tensors(direct).keys()


def test_experts_in_groups_give_the_same_bytes(models: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    for name in ("llama4_text", "gpt_oss"):
        stacked, _ = models[name]
        recipe = GPTQModifier(scheme=INT4, ignore=["lm_head"])
        whole = run(tmp_path / name, stacked, recipe)
        config = job(tmp_path / f"{name} in groups", stacked, recipe)
        with engine.open_plan(config) as plan, open_source(stacked) as source:
            assert plan.means.experts is None
            grouped = replace(plan, means=replace(plan.means, experts=1, forwards=plan.means.forwards))
            skeleton = Skeleton(stacked, source.parts)
            output = tmp_path / f"{name} output"
            with CheckpointWriter(plan.layout, output) as writer:
                sink = engine.WrittenOutput(grouped, writer)
                engine.calibrate(grouped, skeleton, WeightSource(source), rows(), sink, progress=False)
                for kept in grouped.carried:
                    writer.copy(kept, source.tensors[kept], source)
                engine.side_files(grouped, writer, None)
                writer.finish()
        assert tensors(output) == tensors(whole)


def in_mxfp4(source: Path, folder: Path, model: Any) -> dict[str, Tensor]:
    """The gpt-oss of `source` with random codes for its experts' weights in `folder`, as OpenAI publishes it; gives
    back what these mean, and puts it into `model`.
    """
    generator, stored, meant = torch.Generator().manual_seed(0), load_file(source / "model.safetensors"), {}
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
        count, cols, rows = stored.pop(name).shape
        codes = torch.randint(0, 16, (count, rows, cols // 32, 32), generator=generator, dtype=torch.uint8)
        scales = torch.randint(120, 125, (count, rows, cols // 32), generator=generator, dtype=torch.uint8)
        stored |= {f"{name}_blocks": codes[..., ::2] | codes[..., 1::2] << 4, f"{name}_scales": scales}
        steps = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
        value = torch.tensor([*steps, *(-x for x in steps)])[codes.int()] * 2.0 ** (scales[..., None].float() - 127)
        meant[name] = value.flatten(2).transpose(1, 2).contiguous()
    folder.mkdir()
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    model.load_state_dict({**model.state_dict(), **meant})
    return meant


def down(meant: dict[str, Tensor], name: str) -> Tensor:
    return meant[f"{name.rpartition('.')[0]}.down_proj"][0].t()


def test_mxfp4_as_gpt_oss_is_published_is_a_source(tmp_path: Path) -> None:
    model = stack(tmp_path / "plain", "gpt_oss", **WIDE)
    meant = in_mxfp4(tmp_path / "plain", tmp_path / "mxfp4", model)
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    raw = load_file(tmp_path / "mxfp4" / "model.safetensors")
    with open_source(tmp_path / "mxfp4") as source:
        for name, value in meant.items():
            parts = raw[f"{name}_blocks"], raw[f"{name}_scales"]
            assert torch.equal(convert_moe_packed_tensors(*parts, dtype=torch.bfloat16).float(), value)
            assert torch.equal(source.tensor(f"{name.rpartition('.')[0]}.0.down_proj.weight"), down(meant, name))
    model.save_pretrained(tmp_path / "dequantized")
    for name, modifier in (
        ("rounded", QuantizationModifier(scheme=PRESETS["FP8_DYNAMIC"], ignore=["lm_head"])),
        ("gptq", GPTQModifier(scheme=INT4, ignore=["lm_head"])),
        ("attention", QuantizationModifier(scheme=PRESETS["W8A8"], ignore=["lm_head", "re:.*experts.*"])),
    ):
        found = [run(tmp_path / f"{name} {s}", tmp_path / s, modifier) for s in ("mxfp4", "dequantized")]
        assert tensors(found[0]) == tensors(found[1])
    kept = load_file(found[0] / "model.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in meant.items())


@pytest.mark.parametrize("damage", ["scales", "shape", "nan"])
def test_damaged_mxfp4_is_refused(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "mxfp4"
    in_mxfp4(tmp_path / "plain", folder, stack(tmp_path / "plain", "gpt_oss"))
    stored = load_file(folder / "model.safetensors")
    name = f"{E}.down_proj_scales"
    scales = stored.pop(name)
    if damage == "nan":
        scales[1, 2, 0] = 255
    if damage != "scales":
        stored[name] = scales if damage == "nan" else scales[:, 1:].contiguous()
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"down_proj_scales (has NaN|is missing|is U8 \[4, 63, 3\])"):
        run(tmp_path, folder, QuantizationModifier(scheme=PRESETS["W8A8"]))
