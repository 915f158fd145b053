"""The configuration: the seeds' files as written, every kind of error, overrides, schemes, ready files, reference."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from quantkit.config.algorithms import ALGORITHMS, GRANULARITY_OF, STRATEGY_OF, QuantMethod
from quantkit.config.dialect import NOT_SUPPORTED, WITHOUT_EFFECT
from quantkit.config.fields import type_name
from quantkit.config.presets import LLM_COMPRESSOR, PRESETS
from quantkit.config.recipe import (
    AWQModifier,
    GPTQModifier,
    QuantizationModifier,
    Recipe,
    SmoothQuantModifier,
)
from quantkit.config.recipe_file import recipe_of
from quantkit.config.run_config import SECTIONS, GlobalConfig, QuantizationConfig, RunConfig
from quantkit.config.schemes import QuantizationArgs, QuantizationScheme
from quantkit.config.yaml_file import load_run_config
from quantkit.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]

INT8_DYNAMIC = """\
compression:
  name: quantization
  quantization:
    name: int8_dynamic     # Supported: fp8_static, fp8_dynamic, int4_awq, int4_gptq, int8_dynamic
    bits: 8                # Quantization bits
    quant_method:
      weight: "per-channel"
      activation: "per-token"
    ignore_layers:         # Skip quantization for these layers
      - "lm_head"
      - "model.embed_tokens"
"""
FP8_DYNAMIC = """\
compression:
  name: quantization
  quantization:
    name: fp8_dynamic     # Supported: fp8_static, fp8_dynamic, int4_awq, int4_gptq, int8_dynamic
    bits: 8               # Quantization bits
    quant_method:
      weight: "per-tensor"
      activation: "per-tensor"
    ignore_layers:         # Skip quantization for these layers
      - "lm_head"
      - "model.embed_tokens"
"""
FP8_STATIC_LOW_MEMORY = """\
# Compression configuration
compression:
  name: PTQ
  quantization:
    name: fp8_static
    bits: 8
    low_memory: True  # Use less gpu/cpu memory
    quant_method:
      weight: "per-tensor"
      activation: "per-tensor"
    ignore_layers:         # Skip quantization for these layers
      - "lm_head"
      - "model.embed_tokens"
"""
DATASET = """\
dataset:
  name: TextDataset
  data_path: ./dataset/sharegpt_gpt4/sharegpt_gpt4_256.jsonl
  max_seq_length: 4096
  num_samples: 256
  batch_size: 1
"""
ANGELSLIM_HEAD = """\
global: {save_path: ./output}
model: {name: Qwen, model_path: Qwen/Qwen3-0.6B, trust_remote_code: true, low_cpu_mem_usage: true,
        use_cache: false, torch_dtype: auto, device_map: auto}
"""
Q = "compression.quantization"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text: str, *overrides: str, model: str | None = "org/model", name: str = "job.yaml") -> RunConfig:
    Path(name).write_text(text, encoding="utf-8")
    return load_run_config(name, overrides, model_path=model)


def refused(text: str, *overrides: str, model: str | None = "org/model") -> str:
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides, model=model)
    return str(caught.value)


def scheme_of(config: RunConfig) -> QuantizationScheme:
    (group,) = config.recipe.groups
    return group.scheme


def quantization(body: str, more: str = "") -> str:
    return f"compression: {{name: PTQ, quantization: {{{body}}}}}\n{more}"


def calibration_text() -> None:
    path = Path("dataset/sharegpt_gpt4/sharegpt_gpt4_256.jsonl")
    path.parent.mkdir(parents=True)
    path.write_text('{"text": "hello"}\n')


# ---- files as documented


def test_int8_dynamic_runs_as_written() -> None:
    config = load(INT8_DYNAMIC, name="qwen3-0_6b_int8_dynamic.yaml")
    assert config.algorithm == "int8_dynamic"
    assert scheme_of(config).weights == QuantizationArgs(8, "int", strategy="channel", observer="minmax")
    assert scheme_of(config).input_activations == QuantizationArgs(8, "int", strategy="token", dynamic=True)
    assert config.ignore == ("lm_head", "model.embed_tokens")
    assert config.output_dir == Path("output/qwen3-0_6b_int8_dynamic")
    assert config.model.model_path == "org/model" and config.model.trust_remote_code is False
    assert config.dataset is None and config.notes == () and not config.recipe.needs_data


def test_fp8_dynamic_runs_as_written() -> None:
    scheme = scheme_of(load(FP8_DYNAMIC))
    assert scheme.weights == QuantizationArgs(8, "float", strategy="tensor", observer="minmax")
    assert scheme.input_activations == QuantizationArgs(8, "float", strategy="tensor", dynamic=True)
    assert not scheme.needs_calibration


def test_fp8_static_low_memory_runs_as_written() -> None:
    calibration_text()
    config = load(FP8_STATIC_LOW_MEMORY + DATASET)
    inputs = scheme_of(config).input_activations
    assert inputs == QuantizationArgs(8, "float", strategy="tensor", observer="static_minmax")
    assert config.recipe.needs_data
    assert config.dataset is not None
    assert (config.dataset.max_seq_length, config.dataset.num_samples) == (4096, 256)
    assert config.notes == ("accepted, without effect: dataset.batch_size",)
    assert config.low_memory and load(FP8_STATIC_LOW_MEMORY.replace("memory: T", "memroy: T") + DATASET).low_memory


def test_a_whole_angelslim_file_says_what_has_no_effect() -> None:
    config = load(ANGELSLIM_HEAD + INT8_DYNAMIC, model=None)
    assert config.model.model_path == "Qwen/Qwen3-0.6B"
    assert config.model.trust_remote_code is True
    (note,) = config.notes
    for key in ("model.name", "model.low_cpu_mem_usage", "model.use_cache", "model.device_map"):
        assert key in note
    assert "model_path" not in note


@pytest.mark.parametrize("name", ["quantization", "PTQ", "ptq", "PTQWeightOnly", "[PTQ]", "[Quantization]"])
def test_spellings_of_the_compression(name: str) -> None:
    assert load(INT8_DYNAMIC.replace("name: quantization", f"name: {name}")).compression.name == "PTQ"


def test_tools_run_is_quantkit_run() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "run.py"), "-c", "missing.yaml"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT / "python"), "PATH": ""},
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "quantkit run: error: missing.yaml: no such file\n"


def test_loads_without_torch() -> None:
    code = (
        "import sys, quantkit.config.yaml_file; sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    env = {"PYTHONPATH": str(ROOT / "python")}
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode == 0


# ---- what AngelSlim's parser lets through, or stumbles over


def test_a_missing_file_is_an_error_not_a_default(here: Path) -> None:
    (here / "configs").mkdir()
    (here / "configs" / "qwen3-0_6b_int8_dynamic.yaml").write_text(INT8_DYNAMIC)
    with pytest.raises(ConfigError, match=r"no such file \(did you mean 'qwen3-0_6b_int8_dynamic.yaml'\?\)"):
        load_run_config("configs/qwen3-0_6b_int8_dynamc.yaml")
    with pytest.raises(ConfigError, match=r"there is no config \(did you mean 'configs'\?\)"):
        load_run_config("config/qwen3-0_6b_int8_dynamic.yaml")
    with pytest.raises(ConfigError, match="is a folder; give a YAML file"):
        load_run_config("configs")


def test_save_path_under_model_is_sent_to_global() -> None:
    text = "model:\n  model_path: a/b\n  save_path: ./output\n" + INT8_DYNAMIC
    assert "job.yaml:3: model.save_path: unknown key; it belongs to global" in refused(text)


def test_quant_analyse_under_compression_is_not_ignored() -> None:
    text = INT8_DYNAMIC.replace("  name: quantization", "  quant_analyse: true\n  name: quantization")
    assert f"job.yaml:2: compression.quant_analyse: unknown key; it belongs to {Q}" in refused(text)


def test_low_memory_without_data_is_fine_for_dynamic() -> None:
    assert load(FP8_DYNAMIC + "    low_memory: true\n").dataset is None


def test_missing_keys_of_quant_method_keep_their_defaults() -> None:
    method = load(quantization("name: int8_dynamic, quant_method: {weight: per-tensor}")).compression.quantization
    assert method.quant_method == QuantMethod("per-tensor", "per-token", zero_point=False)


@pytest.mark.parametrize("key", ["zero_point", "mse_range"])
def test_dead_keys_are_sent_to_where_they_work(key: str) -> None:
    assert f"{Q}.{key}: unknown key; it belongs to {Q}.quant_method" in refused(
        quantization(f"name: int4, {key}: true")
    )


def test_bits_are_not_ignored() -> None:
    message = refused(INT8_DYNAMIC.replace("bits: 8", "bits: 4"))
    assert f"job.yaml:5: {Q}.bits: 4, but int8_dynamic makes weights of 8 bits" in message


def test_activation_per_channel_is_refused_here_not_in_the_forward() -> None:
    message = refused(FP8_DYNAMIC.replace('activation: "per-tensor"', "activation: per-channel"))
    assert "'per-channel' does not go with fp8_dynamic; use one of per-tensor, per-token" in message


def test_kv_cache() -> None:
    def of(name: str, granularity: str) -> QuantizationArgs | None:
        config = load(quantization(f"name: {name}, quant_method: {{kv_cache: {granularity}}}", DATASET))
        assert config.recipe.needs_data
        return config.recipe.kv_cache

    calibration_text()
    assert of("fp8_dynamic", "per-tensor") == of("int4", "per-tensor") == QuantizationArgs(8, "float")
    assert of("int8_dynamic", "per-head") == QuantizationArgs(8, "int", strategy="attn_head")
    message = refused(quantization("name: fp8_dynamic, quant_method: {kv_cache: per-token}", DATASET))
    assert f"{Q}.quant_method.kv_cache: 'per-token': servers hold" in message and "per-tensor, per-head" in message
    config = load(quantization("name: int8_static, save_name: mindie, quant_method: {kv_cache: per-channel}", DATASET))
    assert config.recipe.kv_cache == QuantizationArgs(8, "int", strategy="channel")
    message = refused(quantization("name: fp8_dynamic, quant_method: {kv_cache: per-tensor}"))
    assert "dataset: fp8_dynamic looks at activations, and there is no such section" in message


def test_static_without_dataset_says_what_to_add() -> None:
    message = refused(FP8_STATIC_LOW_MEMORY)
    assert "job.yaml: dataset: fp8_static looks at activations" in message
    example = yaml.safe_load(message.partition("add:\n")[2])
    assert set(example["dataset"]) <= {f.name for f in dataclasses.fields(SECTIONS["dataset"])}


def test_dataset_that_is_not_needed_is_said_and_not_opened() -> None:
    config = load(INT8_DYNAMIC + DATASET)
    assert config.notes[-1] == "int8_dynamic needs no data: the section dataset is ignored"


# ---- errors


def test_unknown_key_names_file_line_path_and_nearest() -> None:
    message = refused(INT8_DYNAMIC.replace("ignore_layers:", "ignore_layer:"))
    assert message.startswith(f"job.yaml:9: {Q}.ignore_layer: unknown key (did you mean 'ignore_layers'?); ")
    assert "quant_method, ignore_layers, save_name" in message


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("compression:", "compresion:", "job.yaml:1: compresion: unknown key (did you mean 'compression'?)"),
        ("weight:", "weights:", f"job.yaml:7: {Q}.quant_method.weights: unknown key (did you mean 'weight'?)"),
        ("quantization:\n", "quantizaton:\n", "compression.quantizaton: unknown key (did you mean 'quantization'?)"),
        ("bits: 8", "low_memry: 8", f"{Q}.low_memry: unknown key (did you mean 'low_memory'?)"),
    ],
)
def test_unknown_keys(before: str, after: str, expected: str) -> None:
    assert expected in refused(INT8_DYNAMIC.replace(before, after, 1))


def test_section_in_the_wrong_place() -> None:
    assert "job.yaml:1: quantization: unknown key; it belongs to compression" in refused("quantization: {}\n")


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("bits: 8", 'bits: "8"', "bits: expected an integer or null, got the string '8'; without quotes"),
        ("bits: 8", "bits: true", "bits: expected an integer or null, got true"),
        ("bits: 8", "bits: 8.0", "bits: expected an integer or null, got 8.0"),
        ("bits: 8", "low_memory: 1", "low_memory: expected true or false, got 1"),
        ("bits: 8", "save_name:", "save_name: expected a string, got nothing (null)"),
        ("bits: 8", "smooth_alpha: .inf", "smooth_alpha: expected a number, got inf"),
        ("bits: 8", "smooth_alpha: 1.5", "smooth_alpha: 1.5 is not between 0 and 1"),
        ("bits: 8", "quant_helpers: [smoth]", "quant_helpers[0]: no such helper: 'smoth'"),
        ('- "lm_head"', "- 3", "ignore_layers[0]: expected a string, got 3; put it in quotes"),
        ('- "lm_head"', '- " "', "ignore_layers[0]: is empty"),
        ('"per-token"', "[per-token]", "activation: expected a string or null, got a list of 1"),
        ('"per-token"', "per_token", "'per_token' is no granularity (did you mean 'per-token'?)"),
    ],
)
def test_wrong_values(before: str, after: str, expected: str) -> None:
    message = refused(INT8_DYNAMIC.replace(before, after, 1))
    assert expected in message
    assert re.match(rf"job\.yaml:\d+: {re.escape(Q)}\.", message)


def test_wrong_shapes() -> None:
    assert "ignore_layers: expected a list of strings, got the string 'lm_head'; write it as a list" in refused(
        quantization("name: int8, ignore_layers: lm_head")
    )
    assert "job.yaml:1: global: expected a section with keys, got nothing (null)" in refused("global:\n" + INT8_DYNAMIC)
    assert f"{Q}: expected a section with keys, got the string 'int8'" in refused("compression: {quantization: int8}")
    assert "block_size: expected a list of 2 integers, got 3 items" in refused(
        quantization("name: fp8_blockwise, quant_method: {block_size: [1, 2, 3]}")
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "job.yaml: is empty"),
        ("# only a comment\n", "job.yaml: is empty"),
        ("- a\n- b\n", "job.yaml: holds a list of 2, not sections"),
        ("just words", "job.yaml: holds the string 'just words', not sections"),
        ("compression:\n  name: [PTQ\n", "job.yaml:3: not valid YAML: while parsing a flow sequence"),
        ("compression:\n\tname: PTQ\n", "job.yaml:2: not valid YAML:"),
        ("a: 1\n---\nb: 2\n", "job.yaml:2: not valid YAML: expected a single document"),
        ("a: !!python/object/apply:os.getcwd []\n", "job.yaml:1: not valid YAML: could not determine a constructor"),
        ("a: *nowhere\n", "job.yaml:1: not valid YAML: found undefined alias"),
        ("a: 2024-13-45\n", "job.yaml: not valid YAML: month must be in 1..12"),
        ("[" * 500, "job.yaml: not valid YAML:"),
        ("1: 2\n", "job.yaml:1: top level: the key 1 is not a string"),
        ("model: {model_path: x}\n", "job.yaml: the section compression is missing"),
        ("compression: {name: PTQ}\n", f"job.yaml:1: {Q}: is missing"),
        (
            "compression: &a {name: PTQ, quantization: *a}\n",
            f"{Q}.quantization: unknown key; it belongs to compression",
        ),
    ],
)
def test_files_that_are_none(text: str, expected: str) -> None:
    assert expected in refused(text)


def test_bytes_that_are_no_text(here: Path) -> None:
    (here / "job.yaml").write_bytes(b"a: \xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"^job.yaml: not valid YAML: "):
        load_run_config("job.yaml")


def test_a_key_that_stands_twice_is_refused() -> None:
    text = INT8_DYNAMIC + "    bits: 8\n"
    assert refused(text) == f"job.yaml:12: {Q}.bits: is already in line 5; keep one of the two"
    assert "is already in line 1" in refused(quantization("name: int4, name: int8"))


def test_merge_keys_work() -> None:
    text = "model: &m {model_path: a/b}\ncompression: {quantization: {name: int8}}\nglobal: {<<: {seed: 3}, seed: 4}\n"
    assert load(text, model=None).global_.seed == 4


def test_no_model_says_how_to_give_one() -> None:
    assert "the section model is missing; give --model-path" in refused(INT8_DYNAMIC, model=None)
    assert "job.yaml:1: model.model_path: is missing" in refused("model: {}\n" + INT8_DYNAMIC, model=None)
    assert "--model-path: model.model_path: is empty" in refused(INT8_DYNAMIC, model=" ")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("global.save_path=' '", "global.save_path: is empty"),
        ("global.seed=-1", "global.seed: -1 is negative"),
        ("global.num_threads=0", "global.num_threads: 0 must be positive"),
        ("global.max_shard_size=5XB", "'5XB' is no size; write it like 5GB"),
        ("global.max_shard_size=0", "must be positive"),
        (
            "global.calibration_forwards=3",
            "calibration_forwards: 3: a layer takes 1 forward or 2; use auto",
        ),
        ("global.calibration_forwards=yes", "global.calibration_forwards: expected"),
        ("global.calibration_forwards=one", "'one': a layer takes 1 forward or 2"),
        ("model.torch_dtype=bf16", "no such dtype: 'bf16' (did you mean 'bfloat16'?)"),
        ("model.torch_dtype=float8", "use auto, bfloat16, float16, float32, fp8"),
        (
            "compression.name=Sparsity",
            "no such compression: 'Sparsity'; quantkit does 'quantization', also spelled 'PTQ'",
        ),
        ("compression.name=[]", "no such compression"),
        ("dataset.num_samples=0", "dataset.num_samples: 0 must be positive, or -1"),
        ("dataset.max_seq_length=0", "must be positive"),
        ("dataset.name=OmniDataset", "only text is calibrated with"),
        (f"{Q}.name=null", f"{Q}.name: is required, or scheme instead of it; algorithms: int8_dynamic"),
        (f"{Q}.name=int8_dinamic", "no such algorithm: 'int8_dinamic' (did you mean 'int8_dynamic'?)"),
        (f"{Q}.name=w4a17", "no such algorithm: 'w4a17' (did you mean 'W4A16'?)"),
        (f"{Q}.name=nvfp4_gptaq", "'nvfp4_gptaq' is not supported by quantkit"),
        (f"{Q}.name=MXFP6", "'MXFP6' is not supported by quantkit"),
        (f"{Q}.name=INT8", "'INT8' is ambiguous: write name: int8, or scheme: INT8, which differ"),
        (f"{Q}.scheme=W8A8", "say the same thing twice"),
    ],
)
def test_values_that_make_no_sense(override: str, expected: str) -> None:
    message = refused(INT8_DYNAMIC + DATASET, override)
    assert message.startswith(f"--set {override}: ") and expected in message


def test_schemes_that_are_none() -> None:
    assert f"{Q}.scheme: no such scheme: 'W8A9' (did you mean 'W8A8'?); there are W8A8" in refused(
        quantization("scheme: W8A9")
    )
    message = refused(quantization("scheme: MXFP6"))
    assert "'MXFP6' is one of llm-compressor's schemes that quantkit does not support" in message
    assert "did you mean" not in message


@pytest.mark.parametrize("path", sorted(NOT_SUPPORTED))
def test_what_is_not_supported_says_so(path: str) -> None:
    refusal = NOT_SUPPORTED[path]
    assert f"{path}: {refusal.why}" in refused(INT8_DYNAMIC + DATASET, f"{path}=something")
    for value in refusal.harmless:
        load(INT8_DYNAMIC + DATASET, f"{path}={json.dumps(value)}")


def test_zero_is_not_false_for_what_is_not_supported() -> None:
    assert "model.use_audio_in_video" in refused(INT8_DYNAMIC, "model.use_audio_in_video=0")


@pytest.mark.parametrize("path", sorted(WITHOUT_EFFECT))
def test_what_has_no_effect_is_checked_and_said(path: str) -> None:
    value = {str: "x", int: "3", bool: "true"}.get(WITHOUT_EFFECT[path].hint, "null")
    assert path in load(INT8_DYNAMIC + DATASET, f"{path}={value}").notes[0]
    assert f"{path}: expected" in refused(INT8_DYNAMIC + DATASET, f"{path}=[]")


# ---- granularities


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("name: fp8_dynamic, quant_method: {weight: per-group, group_size: 128}", "'per-group' does not go with fp8"),
        ("name: fp8_static, quant_method: {activation: per-token}", "'per-token' does not go with fp8_static"),
        ("name: int8_dynamic, quant_method: {activation: per-tensor}", "it takes per-token"),
        ("name: int8_dynamic, quant_method: {group_size: 128}", "128 goes with weight: per-group"),
        ("name: int8, quant_method: {group_size: 64}", "set quant_method.weight to per-group"),
        ("name: int4, quant_method: {group_size: 12}", "12 must be a multiple of 8"),
        ("name: int4, quant_method: {activation: per-token}", "int4 quantizes weights only"),
        (
            "name: int8_dynamic, quant_method: {zero_point: true}",
            "asymmetric ones come with int4, int8,",
        ),
        (
            "scheme: W4A16_ASYM, quant_method: {zero_point: false}",
            "symmetric ones come with int4, int8,",
        ),
        ("scheme: W4A16, quant_method: {weight: per-channel}", "it takes per-group"),
        ("name: int4, quant_method: {block_size: [128, 128]}", "block_size: goes with weight: per-block"),
        ("name: fp8_blockwise, quant_method: {block_size: [64, 64]}", "is read by no server; use [128, 128]"),
        ("name: int4, quant_method: {actorder: true}", "actorder: int4 does not have it"),
        ("name: int4_gptq, quant_method: {mse_range: true}", "mse_range: int4_gptq does not have it"),
    ],
)
def test_granularities_that_do_not_go_together(body: str, expected: str) -> None:
    message = refused(quantization(body))
    assert message.startswith(f"job.yaml:1: {Q}.quant_method.") and expected in message


def test_group_sizes() -> None:
    def of(body: str) -> QuantizationArgs:
        return scheme_of(load(quantization(body))).weights

    assert (of("name: int4").strategy, of("name: int4").group_size, of("name: int4").symmetric) == ("group", 128, True)
    assert of("name: int4, quant_method: {group_size: -1}").group_size == 128
    assert of("name: int4, quant_method: {group_size: 64, zero_point: true}") == QuantizationArgs(
        4, "int", False, "group", 64, observer="minmax"
    )
    assert of("name: int4, quant_method: {weight: per-channel}").strategy == "channel"
    assert of("name: int8").strategy == "channel"
    assert of("scheme: W4A16, quant_method: {group_size: 32}").group_size == 32
    assert of("name: fp8_blockwise, quant_method: {block_size: [128, 128]}").block_structure == (128, 128)
    assert load(quantization("name: int4, quant_method: {group_size: 256}")).notes == (
        "group_size 256: vLLM's kernels read 32, 64, 128 only",
    )


def test_every_combination_that_is_allowed_is_a_valid_scheme() -> None:
    for algorithm in ALGORITHMS.values():
        for weight in algorithm.weights:
            for activation in algorithm.activations or (None,):
                for zero_point in algorithm.zero_point:
                    method, scheme = algorithm.resolve(QuantMethod(weight, activation, zero_point=zero_point))
                    assert GRANULARITY_OF[scheme.weights.strategy] == weight
                    assert scheme.weights.symmetric is not zero_point
                    inputs = scheme.input_activations
                    assert (inputs and inputs.strategy) == (activation and STRATEGY_OF[activation])
                    assert algorithm.resolve(method) == (method, scheme)


@pytest.mark.parametrize(
    "make",
    [
        lambda: QuantizationScheme("x", QuantizationArgs(strategy="token", dynamic=True)),
        lambda: QuantizationScheme("x", QuantizationArgs(dynamic=True)),
        lambda: QuantizationScheme("x", QuantizationArgs(), QuantizationArgs(strategy="channel")),
        lambda: QuantizationScheme("x", QuantizationArgs(), QuantizationArgs(strategy="group", group_size=128)),
    ],
)
def test_schemes_that_cannot_be(make: Any) -> None:
    with pytest.raises(ConfigError, match=r"^scheme x: "):
        make()


# ---- calibrated algorithms, and recipes

GPTQ = "name: int4_gptq, bits: 4, quant_method: {weight: per-group, group_size: 128}"
AWQ = "name: int4_awq, bits: 4, quant_method: {weight: per-group, group_size: 128, zero_point: true, mse_range: false}"
SMOOTH = "name: int8_dynamic, quant_helpers: [smooth], smooth_alpha: 0.6"


def test_calibrated_algorithms_are_modifiers() -> None:
    calibration_text()

    def of(body: str) -> tuple[Any, ...]:
        config = load(quantization(f"{body}, ignore_layers: [lm_head]", DATASET))
        assert config.recipe.needs_data
        return config.recipe.modifiers

    (gptq,) = of(GPTQ)
    assert isinstance(gptq, GPTQModifier) and gptq.ignore == ("lm_head",)
    # AngelSlim's order of columns leaves no g_idx.
    assert gptq.actorder == "weight" and gptq.groups[0].scheme.weights.actorder is None
    assert of("name: int4_gptq, quant_method: {actorder: false}")[0].actorder is None
    (nvfp4,) = of("name: nvfp4_gptq, bits: 4, quant_method: {weight: per-group, group_size: 16, actorder: true}")
    assert isinstance(nvfp4, GPTQModifier) and nvfp4.actorder == "weight"
    assert nvfp4.groups[0].scheme.weights.scales == "nvfp4" and nvfp4.groups[0].scheme.input_activations is None
    assert of("name: nvfp4_gptq")[0] == nvfp4 and of("name: nvfp4_gptq, quant_method: {actorder: false}")[0] != nvfp4
    (awq,) = of(AWQ)
    assert isinstance(awq, AWQModifier) and not awq.clip and not awq.groups[0].scheme.weights.symmetric
    assert of(AWQ.replace("mse_range: false", "mse_range: true"))[0].clip
    smooth, rtn = of(SMOOTH)
    assert isinstance(smooth, SmoothQuantModifier) and smooth.smoothing_strength == 0.6
    assert type(rtn) is QuantizationModifier
    message = refused(quantization(GPTQ))
    assert "dataset: int4_gptq looks at activations, and there is no such section" in message


RECIPE = """\
compression:
  recipe:
    quant_stage:
      quant_modifiers:
        SmoothQuantModifier: {smoothing_strength: 0.8}
        GPTQModifier:
          config_groups:
            attention: {targets: ['re:.*self_attn.*'], weights: {num_bits: 8, strategy: channel}}
            mlp: {targets: ['re:.*mlp.*'], weights: {num_bits: 4, group_size: 64, actorder: static}}
          ignore: [lm_head]
          kv_cache_scheme: {num_bits: 8, type: float, strategy: tensor}
"""


def test_a_recipe_in_yaml() -> None:
    calibration_text()
    config = load(RECIPE + DATASET)
    smooth, gptq = config.recipe.modifiers
    assert isinstance(smooth, SmoothQuantModifier) and isinstance(gptq, GPTQModifier)
    assert [group.scheme.name for group in config.recipe.groups] == ["attention", "mlp"]
    assert config.algorithm == "SmoothQuant + GPTQ attention / mlp / KV FP8" and config.ignore == ("lm_head",)
    again = load(yaml.safe_dump(config.to_dict(), sort_keys=False), model=None)
    assert again.recipe.groups == config.recipe.groups and again.to_dict() == config.to_dict()
    message = refused(RECIPE + "  quantization: {name: int4}\n")
    assert "compression.recipe: and quantization both given; use one of them" in message


def test_a_recipe_with_one_modifier_twice_is_written_and_read() -> None:
    made = Recipe(
        (
            QuantizationModifier(scheme="FP8_DYNAMIC", targets="re:.*mlp.*"),
            QuantizationModifier(scheme="W8A16", targets="re:.*self_attn.*"),
            GPTQModifier(scheme="W4A16", targets="model.layers.0.mlp.up_proj"),
        )
    )
    assert recipe_of(made.to_dict()) == made


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("SmoothQuantModifier", "SmoothQaunt"), "no such modifier (did you mean 'SmoothQuant"),
        (("smoothing_strength", "strength"), "SmoothQuantModifier.strength: unknown (did you mean"),
        (("actorder: static", "actorder: up"), "actorder: 'up' is not 'group', 'weight' or null"),
        (("actorder: static", "actorder: group"), "actorder 'group' in some groups only"),
    ],
)
def test_wrong_recipes(change: tuple[str, str], expected: str) -> None:
    message = refused(RECIPE.replace(*change) + DATASET)
    assert message.startswith("job.yaml") and "compression.recipe.quant_stage.quant_modifiers" in message
    assert expected in message


def test_smooth_alpha_alone_has_no_effect() -> None:
    (note,) = load(quantization("name: int8_dynamic, smooth_alpha: 1")).notes
    assert note == f"accepted, without effect: {Q}.smooth_alpha"


# ---- overrides


def test_overrides_win_in_their_order() -> None:
    Path("job.yaml").write_text("global: {save_path: a}\nmodel: {model_path: m}\n" + INT8_DYNAMIC)
    sets = ["global.save_path=b", "model.model_path=n", "global.seed=7", "global.seed=8", f"{Q}.ignore_layers=[]"]
    config = load_run_config("job.yaml", sets)
    assert (config.global_.save_path, config.model.model_path, config.global_.seed, config.ignore) == ("b", "n", 8, ())
    config = load_run_config("job.yaml", sets, model_path="o", save_path="c", overwrite=True)
    assert (config.output_dir, config.model.model_path, config.global_.overwrite) == (Path("c/job"), "o", True)
    assert not load_run_config("job.yaml").global_.overwrite


def test_an_override_makes_the_section_it_needs() -> None:
    calibration_text()
    config = load(FP8_STATIC_LOW_MEMORY, "dataset.data_path=dataset/sharegpt_gpt4/sharegpt_gpt4_256.jsonl")
    assert config.dataset is not None and config.dataset.num_samples == 256
    sets = [f"{Q}.quant_method.group_size=64", f"{Q}.ignore_layers=['re:.*o_proj', \"a=b\"]"]
    config = load(quantization("name: int4"), *sets)
    assert scheme_of(config).weights.group_size == 64
    assert config.ignore == ("re:.*o_proj", "a=b")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("global.seed", "write it as key=value"),
        ("=3", "write it as key=value"),
        ("global..seed=3", "write it as key=value"),
        ("global.sede=3", "global.sede: unknown key (did you mean 'seed'?)"),
        ("globl.seed=3", "globl: unknown key (did you mean 'global'?)"),
        ("quantization.bits=8", "quantization: unknown key; it belongs to compression"),
        ("compression.name.x=1", "compression.name is the string 'quantization', not a section"),
        (f"{Q}.bits='8'", "bits: expected an integer or null, got the string '8'"),
        (f"{Q}.bits=[1", "not valid YAML"),
        ("global={seed: 1, seed: 2}", "seed: is already in line 1"),
    ],
)
def test_wrong_overrides(override: str, expected: str) -> None:
    message = refused(INT8_DYNAMIC, override)
    assert message.startswith(f"--set {override}") and expected in message


def test_an_error_names_the_option_that_set_the_value() -> None:
    message = refused(INT8_DYNAMIC, "global={sede: 1}", "global.seed=2")
    assert message.startswith("--set global={sede: 1}: global.sede: unknown key")
    message = refused(INT8_DYNAMIC, f"{Q}.name=int4")
    assert message.startswith(f"job.yaml:8: {Q}.quant_method.activation: 'per-token', but int4 quantizes weights only")


# ---- paths


def test_data_is_looked_for_here_then_beside_the_file(here: Path) -> None:
    folder = here / "jobs"
    folder.mkdir()
    (folder / "job.yaml").write_text(FP8_STATIC_LOW_MEMORY + "dataset: {data_path: texts/a.jsonl}\n")

    def found() -> str:
        dataset = load_run_config("jobs/job.yaml", model_path="m").dataset
        assert dataset is not None
        return dataset.data_path

    with pytest.raises(ConfigError) as caught:
        found()
    assert str(caught.value).startswith("jobs/job.yaml:14: dataset.data_path: no such file: texts/a.jsonl")
    assert f"looked for {here}/texts/a.jsonl and {here}/jobs/texts/a.jsonl" in str(caught.value)
    (folder / "texts").mkdir()
    (folder / "texts" / "a.jsonl").write_text("{}\n")
    assert found() == "jobs/texts/a.jsonl"
    (here / "texts").mkdir()
    (here / "texts" / "a.jsonl").write_text("{}\n")
    assert found() == "texts/a.jsonl"


def test_a_model_folder_is_looked_for_here_then_beside_the_file(here: Path) -> None:
    (here / "jobs" / "org" / "model").mkdir(parents=True)
    (here / "jobs" / "job.yaml").write_text("model: {model_path: org/model}\n" + INT8_DYNAMIC)
    assert load_run_config("jobs/job.yaml").model.model_path == "jobs/org/model"
    assert load_run_config("jobs/job.yaml", model_path="org/model").model.model_path == "org/model"
    (here / "org" / "model").mkdir(parents=True)
    assert load_run_config("jobs/job.yaml").model.model_path == "org/model"


@pytest.mark.parametrize(
    ("size", "count"),
    [("5GB", 5_000_000_000), ("500mib", 500 << 20), ("1.5 KB", 1500), (4096, 4096), ("4096", 4096), ("2TiB", 2 << 40)],
)
def test_shard_sizes(size: int | str, count: int) -> None:
    assert GlobalConfig(max_shard_size=size).max_shard_bytes == count


# ---- what comes out


@pytest.mark.parametrize(
    "text",
    [INT8_DYNAMIC, FP8_DYNAMIC, quantization("name: int4_rtn")]
    + [quantization(body, "dataset: {data_path: a.txt}") for body in (GPTQ, AWQ, SMOOTH)]
    + [quantization(f"scheme: {name.lower()}", "dataset: {data_path: a.txt}") for name in PRESETS],
)
def test_the_resolved_configuration_reads_as_itself(text: str, here: Path) -> None:
    (here / "a.txt").write_text("text")
    config = load(text)
    plain = config.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    again = load(yaml.safe_dump(plain), model=None)
    assert again.to_dict() == plain
    assert again.recipe == config.recipe and again.compression == config.compression


def test_made_in_python() -> None:
    made = QuantizationConfig(name="int4", quant_method=QuantMethod(group_size=32))
    assert (made.bits, made.quant_method.weight) == (4, "per-group")
    with pytest.raises(ConfigError, match=r"^bits: 8, but int4 makes weights of 4 bits"):
        QuantizationConfig(name="int4", bits=8)


@pytest.mark.parametrize("name", LLM_COMPRESSOR)
def test_presets_are_those_of_llm_compressor(name: str) -> None:
    library = pytest.importorskip("compressed_tensors.quantization.quant_scheme")
    theirs = library.preset_name_to_scheme(name, ["Linear"])
    ours = PRESETS[name]
    for role in ("weights", "input_activations"):
        mine, other = getattr(ours, role), getattr(theirs, role)
        assert (mine is None) == (other is None)
        if mine is not None:
            # The observer is a name for who reads the config; ours are AngelSlim's.
            for key in set(asdict(mine)) - {"observer", "outlier_threshold"}:
                value = getattr(other, key)
                assert getattr(mine, key) == (tuple(value) if isinstance(value, list) else value), key


# ---- ready files and the reference


def _make_configs() -> Any:
    spec = importlib.util.spec_from_file_location("make_configs", ROOT / "tools" / "make_configs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ready_files_are_those_of_the_script() -> None:
    assert _make_configs().differences() == []


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_ready_files_load(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_run_config(path)
    algorithm = "int8_dynamic" if path.parent.name == "smooth_int8" else path.parent.name
    assert config.algorithm == algorithm and algorithm in path.stem
    scheme = scheme_of(config)
    assert scheme == ALGORITHMS[algorithm].resolve(QuantMethod(group_size=scheme.weights.group_size))[1]
    assert (config.recipe.modifiers[0].kind == "smoothquant") == ("smooth" in path.stem)
    assert not [note for note in config.notes if "low_memory" not in note]


@pytest.mark.parametrize(
    "name",
    [
        "qwen3/int8_dynamic/qwen3-0_6b_int8_dynamic",
        "qwen2_5/fp8_dynamic/qwen2_5-7b_instruct_fp8_dynamic",
        "qwen2_5/fp8_static/qwen2_5-7b_instruct_fp8_static",
        "qwen3/fp8_static/qwen3-a22b_fp8_static_low_memory",
        "qwen3/fp8_static/qwen3-a22b_fp8_static_low_memroy",
    ],
)
def test_files_that_documents_name_are_there(name: str) -> None:
    assert (ROOT / "configs" / f"{name}.yaml").is_file()


def _tables() -> dict[str, list[list[str]]]:
    """Heading of docs/config.md -> the rows of its tables, header aside, cells without backquotes."""
    tables: dict[str, list[list[str]]] = {}
    heading = ""
    for line in (ROOT / "docs" / "config.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ").strip("`")
        elif line.startswith("|") and not line.startswith("|---"):
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            tables.setdefault(heading, []).append([cell.strip("`") for cell in cells])
    return {name: rows[1:] for name, rows in tables.items()}


def test_reference_has_every_key_with_type_and_default() -> None:
    tables = _tables()

    def check(cls: type[Any], path: str) -> None:
        hints = get_type_hints(cls)
        rows = {row[0]: row for row in tables[path]}
        assert set(rows) == set(hints), path
        for field in dataclasses.fields(cls):
            hint = hints[field.name]
            assert rows[field.name][1] == type_name(hint), f"{path}.{field.name}"
            for option in {hint, *get_args(hint)} - {Recipe}:
                if dataclasses.is_dataclass(option):
                    check(option, f"{path}.{field.name}")  # type: ignore[arg-type]
            if field.default is not dataclasses.MISSING:
                default = field.default if isinstance(field.default, str) else json.dumps(field.default)
            else:
                default = "the algorithm's" if field.default_factory is not dataclasses.MISSING else "required"
            assert rows[field.name][2] == default, f"{path}.{field.name}"

    for key, cls in SECTIONS.items():
        check(cls, key)


def test_reference_has_every_algorithm_and_scheme() -> None:
    tables = _tables()
    rows = {row[0]: row for row in tables["Algorithms"]}
    assert set(rows) == set(ALGORITHMS)
    for name, algorithm in ALGORITHMS.items():
        _, weights, activations, asymmetric, data = rows[name]
        assert re.findall(r"per-\w+", weights) == list(algorithm.weights)
        assert re.findall(r"per-\w+", activations) == list(algorithm.activations)
        assert asymmetric.startswith("yes") == (True in algorithm.zero_point)
        calibrated = algorithm.modifier is not QuantizationModifier
        assert (data == "yes") == (algorithm.scheme.needs_calibration or calibrated)
    schemes = {name.strip("`"): row for row in tables["Schemes"] for name in row[0].split(", ")}
    assert set(schemes) == set(PRESETS)
    for name, scheme in PRESETS.items():
        assert (schemes[name][3] == "yes") == scheme.needs_calibration
        assert str(scheme.weights.group_size or "per-") in schemes[name][1]


def test_reference_has_what_is_without_effect_or_not_supported() -> None:
    tables = _tables()
    assert [row[:2] for row in tables["Accepted, without effect"]] == [
        [key, type_name(accepted.hint)] for key, accepted in WITHOUT_EFFECT.items()
    ]
    assert [row[:2] for row in tables["Not supported"]] == [
        [key, refusal.why] for key, refusal in NOT_SUPPORTED.items()
    ]
