"""A group for attention: what a recipe may say, what is planned, and scales of queries against a model's in fp64."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.masking_utils import eager_mask

import quantkit
from quantkit import engine, oneshot
from quantkit.audit import AuditResult, audit
from quantkit.checkpoint.reader import Checkpoint
from quantkit.config.algorithms import QuantMethod
from quantkit.config.attention import AttentionGroup
from quantkit.config.recipe_file import recipe_of
from quantkit.config.run_config import CalibrationConfig, CompressionConfig, QuantizationConfig, RunConfig
from quantkit.config.schemes import QuantizationArgs
from quantkit.convert import convert
from quantkit.errors import CheckpointError, ConfigError, PlanError
from quantkit.formats.fp8_source import open_source
from quantkit.formats.source import WeightSource
from quantkit.inspection import inspect_folder
from quantkit.merge_statistics import merge_statistics
from quantkit.modifiers import GPTQModifier, QuantizationModifier
from quantkit.report.plan_view import render_plan

from .test_statistics_file import config, one_thread, replayed, require_same, statistics, swept, tokens
from .tiny import make

__all__ = ["one_thread"]  # a fixture for all that is here
FP8 = {"num_bits": 8, "type": "float", "strategy": "attn_head"}
W4A16 = {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 16}}


def attention(target: str = "Attention", **args: Any) -> dict[str, Any]:
    return {"targets": [target], "input_activations": FP8 | args}


def recipe(target: str = "Attention", **args: Any) -> QuantizationModifier:
    return QuantizationModifier(config_groups={"attention": attention(target, **args)})


# ---- what a recipe may say ----
def test_it_is_the_cache_and_the_queries() -> None:
    made = recipe_of([recipe("LlamaAttention")])
    args = QuantizationArgs(8, "float", strategy="attn_head")
    assert made.attention == AttentionGroup("attention", ("LlamaAttention",), args)
    assert made.kv_cache == args and made.groups == () and made.needs_data and made.name == "attention FP8"
    assert recipe_of(made.to_dict()) == made
    both = {"attention": attention("LlamaAttention"), "linears": W4A16}
    made = recipe_of([GPTQModifier(config_groups=both, ignore=["lm_head"], kv_cache_scheme=FP8)])
    assert made.name == "GPTQ linears / attention FP8" and recipe_of(made.to_dict()) == made
    again = recipe_of({"GPTQModifier": {"config_groups": both, "ignore": "lm_head", "kv_cache_scheme": FP8}})
    assert again.attention == made.attention and again.groups == made.groups


def test_compressed_tensors_own_objects_say_it_too() -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    args = quantization.QuantizationArgs(num_bits=8, type="float", strategy="attn_head")
    scheme = quantization.QuantizationScheme(targets=["LlamaAttention"], input_activations=args)
    assert QuantizationModifier(config_groups={"attention": scheme}) == recipe("LlamaAttention")


def test_it_is_said_in_yaml_beside_the_cache() -> None:
    section = QuantizationConfig(name="fp8_dynamic", quant_method=QuantMethod(kv_cache="per-head", queries=True))
    (modifier,) = section.recipe.modifiers
    assert isinstance(modifier, QuantizationModifier) and modifier.attention is not None
    assert modifier.attention == AttentionGroup("queries", ("Attention",), QuantizationArgs(**FP8))
    assert [group.scheme.name for group in modifier.groups] == ["fp8_dynamic"]
    assert recipe_of(section.recipe.to_dict()) == section.recipe
    for cache in (None, "per-channel"):
        with pytest.raises(ConfigError, match=r"queries: true, but kv_cache is .*per-tensor or per-head"):
            QuantMethod(kv_cache=cache, queries=True)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"a": attention(strategy="token", dynamic=True)}, "a.input_activations: .*dynamic, strategy token: queries"),
        ({"a": attention(strategy="group", group_size=32, type="int")}, "strategy group: .*tensor or attn_head"),
        ({"a": attention(strategy="block", block_structure=[8, 8])}, "strategy block"),
        ({"a": attention(strategy="channel")}, "strategy channel"),
        ({"a": attention(dynamic=True)}, "8 bit, symmetric, dynamic, strategy attn_head: queries"),
        ({"a": attention(type="int", num_bits=4)}, "4 bit"),
        ({"a": attention(type="int", symmetric=False)}, "asymmetric"),
        ({"a": attention(observer="mse")}, "observer: 'mse': scales of queries, keys and values are found by minmax"),
        ({"a": {"targets": ["LlamaAttention"]}}, "a.input_activations: is missing: it says how queries"),
        ({"a": {**attention(), "targets": ["LlamaAttention", "Linear"]}}, "'Linear' beside a class of attention"),
        ({"a": {**attention(), "targets": ["LlamaAttention", "re:.*attn$"]}}, "'re:.*attn.' beside a class"),
        ({"a": {**W4A16, "targets": ["LlamaAttention"]}}, "do not go with LlamaAttention: weights are those of Lin"),
        ({"a": {**attention(), "targets": ["re:.*self_attn$"]}}, "a.weights: is missing; only a group for classes of"),
        ({"a": {**attention(), "targets": ["Linear"]}}, "a.weights: is missing; only a group for classes of attention"),
        ({"a": {**attention(), "output_activations": FP8}}, "a.output_activations: is not supported"),
        ({"a": {**attention(), "wieghts": None}}, "a.wieghts: unknown .did you mean 'weights'"),
        ({"a": attention(), "b": attention()}, "a and b are both for attention"),
    ],
)
def test_what_no_server_reads_is_refused(groups: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe_of({"QuantizationModifier": {"config_groups": groups}})


def test_a_cache_of_another_kind_is_refused() -> None:
    for cache in ("fp8", "int8", {**FP8, "type": "int"}):
        with pytest.raises(ConfigError, match="kv_cache_scheme: is another quantization than config_"):
            QuantizationModifier(config_groups={"attention": attention()}, kv_cache_scheme=cache)
    with pytest.raises(ConfigError, match="input_observer: 'mse'"):
        QuantizationModifier(config_groups={"attention": attention()}, input_observer="mse")
    with pytest.raises(ConfigError, match="gives kv_cache_scheme twice, as a group for attention does, too"):
        recipe_of([recipe(), QuantizationModifier(kv_cache_scheme="fp8")])


# ---- what is planned ----
@pytest.mark.parametrize("target", ["Attention", "LlamaAttention"])
@pytest.mark.parametrize("strategy", ["tensor", "attn_head"])
def test_scales_and_the_group_are_planned(strategy: str, target: str, tmp_path: Path) -> None:
    make(tmp_path / "model", "llama")
    groups = {"attention": attention(target, strategy=strategy), "linears": W4A16}
    with engine.open_plan(config(tmp_path, QuantizationModifier(config_groups=groups, ignore=["lm_head"]))) as plan:
        planned = {tensor.name: tensor for shard in plan.layout.shards for tensor in shard.tensors}
        block, shown = plan.config_json["quantization_config"], render_plan(plan)
    for layer in range(3):
        for part, heads in (("q", 4), ("k", 2), ("v", 2)):
            tensor = planned[f"model.layers.{layer}.self_attn.{part}_scale"]
            assert (tensor.dtype, tensor.shape) == ("F32", (heads, 1, 1) if strategy == "attn_head" else (1,))
    assert "queries: as the KV cache, in LlamaAttention" in shown and f"per {strategy} (3 attention layers)" in shown
    assert list(block["config_groups"]) == ["group_0", "group_1"] and block["format"] == "pack-quantized"
    group = block["config_groups"]["group_1"]
    assert group["targets"] == ["LlamaAttention"] and group["weights"] is None and group["format"] == "dense"
    assert group["input_activations"] == block["kv_cache_scheme"]


def test_what_does_not_fit_the_model_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "model", "qwen3")

    def refused(modifier: QuantizationModifier, **compression: Any) -> str:
        job = config(tmp_path, modifier)
        with pytest.raises(PlanError) as error, engine.open_plan(_with(job, **compression)):
            pass
        return str(error.value)

    told = refused(recipe("LlamaAttention"))
    assert "'LlamaAttention' is no class of this model, whose attention is Qwen3Attention" in told
    assert "save_name 'fp8' has no place for scales of queries" in refused(recipe(strategy="tensor"), save_name="fp8")
    int8 = recipe(strategy="tensor", type="int")
    assert "save_name 'mindie' has no place for scales of queries" in refused(int8, save_name="mindie")
    groups = {"attention": attention(), "linears": W4A16}
    modifier = QuantizationModifier(config_groups=groups, ignore=["re:.*self_attn.*"])
    assert "'re:.*self_attn.*' matches model.layers.0.self_attn itself" in refused(modifier)
    modifier = QuantizationModifier(config_groups=groups, ignore=[r"re:.*self_attn\..*", "lm_head"])
    with engine.open_plan(config(tmp_path, modifier)) as plan:
        assert plan.attention is not None and not any("self_attn" in name for name in plan.modules)
    make(tmp_path / "model", "deepseek_v3")
    assert "strategy attn_head needs num_key_value_heads" in refused(recipe())


def _with(job: RunConfig, **compression: Any) -> RunConfig:
    return replace(job, compression=replace(job.compression, **compression)) if compression else job


# ---- what is calibrated ----
def magnitudes(folder: Path, rows: Sequence[Sequence[int]], weights: Path | None = None) -> dict[str, torch.Tensor]:
    """The largest magnitude of each head's queries, as attention gets them from Transformers in fp64; with the weights
    that the codes in the folder `weights` mean.
    """
    seen: dict[str, torch.Tensor] = {}
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").double()
    plain = sys.modules[type(model).__module__].eager_attention_forward

    def noting(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = f"model.layers.{module.layer_idx}.self_attn"
        largest = query.abs().amax((0, 2, 3))
        seen[name] = torch.maximum(seen.get(name, largest), largest)
        return plain(module, query, *args, **kwargs)

    AttentionInterface.register("eager_noting", noting)
    AttentionMaskInterface.register("eager_noting", eager_mask)
    if weights is not None:
        with Checkpoint(weights) as checkpoint:
            source = WeightSource(checkpoint)
            for module in source.modules:
                model.get_submodule(module).weight.data = source.get(f"{module}.weight").double()
    model.set_attn_implementation("eager_noting")
    model.set_experts_implementation("eager")
    with torch.inference_mode():
        for row in rows:
            model(torch.tensor([row]))
    return seen


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "phi3", "mixtral", "deepseek_v3"])
def test_queries_are_those_of_a_model_in_fp64(model_type: str, tmp_path: Path) -> None:
    """Rows of several lengths, so that padding is among them."""
    make(tmp_path / "model", model_type)
    rows = tokens(7)
    by_head = model_type != "deepseek_v3"
    output = _oneshot(tmp_path, recipe(strategy="attn_head" if by_head else "tensor"), rows)
    found, seen = load_file(output / "model.safetensors"), magnitudes(tmp_path / "model", rows)
    assert len(seen) == 3
    for name, largest in seen.items():
        scale = found[f"{name}.q_scale"]
        expected = largest.reshape(-1, 1, 1) if by_head else largest.amax().reshape(1)
        assert scale.dtype == torch.float32 and scale.shape == expected.shape
        # fp32 through at most three layers of sums of 96 terms, and attention.
        torch.testing.assert_close(scale.double(), expected / 448, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("model_type", "modifier"), [("llama", QuantizationModifier), ("llama", GPTQModifier), ("gemma2", GPTQModifier)]
)
def test_queries_are_those_that_quantized_weights_make(model_type: str, modifier: Any, tmp_path: Path) -> None:
    make(tmp_path / "model", model_type)
    rows = tokens(7)
    groups = {"attention": attention(type="int"), "linears": W4A16}
    output = _oneshot(tmp_path, modifier(config_groups=groups, ignore=["lm_head"]), rows)
    found, plain = load_file(output / "model.safetensors"), magnitudes(tmp_path / "model", rows)
    for name, largest in magnitudes(tmp_path / "model", rows, output).items():
        scale = found[f"{name}.q_scale"].flatten().double()
        torch.testing.assert_close(scale, largest / 127, rtol=1e-4, atol=0)
        assert not torch.allclose(scale, plain[name] / 127, rtol=1e-3)


def _oneshot(tmp_path: Path, modifier: QuantizationModifier, rows: Any, name: str = "out", **options: Any) -> Path:
    """The output of a run on `tmp_path / "model"`, audited."""
    output = tmp_path / name
    oneshot(str(tmp_path / "model"), recipe=modifier, dataset=rows, output_dir=str(output), **options)
    result = _audited(output, tmp_path / "model")
    assert result.ok, result.render()
    return output


def _audited(output: Path, model: Path) -> AuditResult:
    with open_source(model) as source:
        return audit(output, source)


def test_a_model_in_memory_rounds_queries_and_saves_the_same_bytes(tmp_path: Path) -> None:
    rows = tokens(7)
    for implementation in ("sdpa", "eager"):  # as users have it
        folder = tmp_path / implementation
        make(folder / "model", "llama")
        groups = {"attention": attention(), "linears": W4A16}
        modifier = QuantizationModifier(config_groups=groups, ignore=["lm_head"])
        output = _oneshot(folder, modifier, rows)
        model = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation=implementation)
        oneshot(model, recipe=modifier, dataset=rows)
        model.save_pretrained(folder / "saved")
        saved, expected = (load_file(where / "model.safetensors") for where in (folder / "saved", output))
        assert saved.keys() == expected.keys() and all(torch.equal(saved[name], expected[name]) for name in saved)
        blocks = [
            json.loads((where / "config.json").read_text())["quantization_config"]
            for where in (folder / "saved", output)
        ]
        assert blocks[0] == blocks[1]
        loaded, ids = quantkit.load(output), torch.tensor([rows[0]])
        with torch.inference_mode():
            ours, theirs = model(ids).logits, loaded(ids).logits
            for module in model.modules():
                if hasattr(module, "quantize_query"):
                    del module.quantize_query
            without = model(ids).logits
        off = float((without - theirs).abs().mean())
        assert off > 0 and float((ours - theirs).abs().mean()) < 0.02 * off


# ---- statistics ----
@pytest.mark.parametrize("model_type", ["gemma2", "qwen3_moe"])
def test_they_come_from_a_file_of_statistics_too(model_type: str, tmp_path: Path) -> None:
    make(tmp_path / "model", model_type)
    rows = tokens(8)
    folder = statistics(tmp_path, rows)
    halves = [statistics(tmp_path, rows[i::2], f"half{i}") for i in range(2)]
    merged = merge_statistics(halves, tmp_path / "merged", progress=False)
    groups = {"attention": attention(), "linears": W4A16}
    job = config(tmp_path, QuantizationModifier(config_groups=groups, ignore=["lm_head"]))
    expected = swept(job, rows)
    assert len(expected.queries) == 3
    for found in (folder, merged):
        kept, _ = replayed(job, found)
        require_same(kept, expected)


def test_a_file_without_queries_is_told(tmp_path: Path) -> None:
    make(tmp_path / "model", "llama")
    job = config(tmp_path, recipe())
    folder = statistics(tmp_path, tokens(4), gather=("kv_cache",))
    with pytest.raises(PlanError, match=r"needs queries of model.layers.\*.self_attn x3, .*with queries in calibrat"):
        replayed(job, folder)
    # As an earlier release wrote it.
    contents = json.loads((folder / "statistics.json").read_text())
    assert contents.pop("queries") == {}
    (folder / "statistics.json").write_text(json.dumps(contents))
    kept, _ = replayed(config(tmp_path, QuantizationModifier(kv_cache_scheme="fp8")), folder)
    assert len(kept.caches) == 3
    folder = statistics(tmp_path, tokens(4), "queries", gather=("queries",))
    with pytest.raises(PlanError, match="needs keys and values of"):
        replayed(job, folder)
    contents = json.loads((folder / "statistics.json").read_text())
    (folder / "statistics.json").write_text(json.dumps(contents | {"kinds": []}))
    with pytest.raises(CheckpointError, match="queries without queries in kinds"):
        replayed(job, folder)
    (folder / "statistics.json").write_text(json.dumps(contents))
    (part,) = [path for path in folder.glob("*-00001-*.safetensors")] or list(folder.glob("*1*.safetensors"))
    tensors = load_file(part)
    name = next(name for name in tensors if name.endswith(".query"))
    save_file(tensors | {name: -tensors[name]}, part)
    with pytest.raises(CheckpointError, match="has NaN, Inf or negative magnitudes"):
        replayed(job, folder)
    where = name.removesuffix(".query")
    index = json.loads((folder / "statistics.safetensors.index.json").read_text())
    for other, heads, message in ((where, 3, "has 4 heads, and statistics of 3"), ("x", 4, "'x' is no attention of")):
        value = {f"{other}.query": torch.ones(heads)}
        save_file({n: t for n, t in tensors.items() if n != name} | value, part)
        weights = {f"{other}.query" if n == name else n: file for n, file in index["weight_map"].items()}
        (folder / "statistics.safetensors.index.json").write_text(json.dumps(index | {"weight_map": weights}))
        queries = {n: count for n, count in contents["queries"].items() if n != where} | {other: heads}
        (folder / "statistics.json").write_text(json.dumps(contents | {"queries": queries}))
        with pytest.raises(CheckpointError, match=message):
            replayed(config(tmp_path, QuantizationModifier(scheme="FP8", ignore=["lm_head"])), folder)


# ---- what is written ----
def test_damage_is_found(tmp_path: Path) -> None:
    make(tmp_path / "model", "llama")
    groups = {"attention": attention(), "linears": W4A16}
    output = _oneshot(tmp_path, QuantizationModifier(config_groups=groups, ignore=["lm_head"]), tokens(4))
    assert "queries of 3 are rounded, too, scales of " in inspect_folder(output, progress=False).render()
    tensors, name = load_file(output / "model.safetensors"), "model.layers.1.self_attn.q_scale"

    def found(value: torch.Tensor | None) -> str:
        now = {n: t for n, t in (tensors | {name: value}).items() if t is not None}
        save_file(now, output / "model.safetensors", metadata={"format": "pt"})
        result = _audited(output, tmp_path / "model")
        assert not result.ok
        return result.render()

    assert f"{name}: F32 [2, 1, 1], expected F32 [4, 1, 1]" in found(tensors[name][:2].clone())
    assert name in found(tensors[name] * float("nan"))
    assert name in found(-tensors[name])
    assert name in found(None)


def test_a_conversion_keeps_them_or_refuses(tmp_path: Path) -> None:
    make(tmp_path / "model", "llama")
    linears = {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}}
    groups = {"attention": attention(), "linears": linears}
    output = _oneshot(tmp_path, QuantizationModifier(config_groups=groups, ignore=["lm_head"]), tokens(4))
    with pytest.raises(ConfigError, match="no place for KV-cache scales"):
        convert(output, tmp_path / "gptq", "gptq")
    made = convert(output, tmp_path / "w8a8", "compressed-tensors", scheme="W8A8")
    blocks = [json.loads((where / "config.json").read_text())["quantization_config"] for where in (output, made)]
    assert blocks[0]["config_groups"]["group_1"] == blocks[1]["config_groups"]["group_1"]
    quantkit.load(made)


def test_sections_of_the_configuration_take_it() -> None:
    assert "queries" in CalibrationConfig().gather
    assert CompressionConfig(recipe=recipe_of([recipe()])).recipe is not None
