"""The plan: what it finds, what it refuses, and that it is quick; all from headers, without a weight."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from quantkit.checkpoint.reader import Checkpoint
from quantkit.config.yaml_file import load_run_config
from quantkit.errors import ConfigError, PlanError
from quantkit.plan import Plan, build_plan
from quantkit.report.plan_view import render_plan

from .headers import llama, write_headers

ROOT = Path(__file__).resolve().parents[2]
MOE = ROOT / "examples" / "models" / "tiny-moe"


def plan(model: Path, folder: Path, quantization: str, *ignore: str) -> Plan:
    return build(model, folder, f"quantization: {{{quantization}, ignore_layers: [{', '.join(ignore)}]}}")


def planned(model: Path, folder: Path, *modifiers: str) -> Plan:
    """The plan of a recipe, its modifiers in YAML."""
    return build(model, folder, f"recipe: {{quant_stage: {{quant_modifiers: [{', '.join(modifiers)}]}}}}")


def build(model: Path, folder: Path, what: str) -> Plan:
    yaml = folder / "job.yaml"
    yaml.write_text(
        f"global: {{save_path: {folder}}}\nmodel: {{model_path: {model}}}\n"
        f"compression: {{name: PTQ, {what}}}\ndataset: {{data_path: job.yaml, max_seq_length: 64, num_samples: 4}}"
    )
    with Checkpoint(model) as checkpoint:
        return build_plan(load_run_config(yaml), checkpoint)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return llama(tmp_path / "small", hidden=256, intermediate=768, layers=3, kv=128, vocab=512, tied=True)


def test_what_is_quantized_and_what_the_output_holds(small: Path, tmp_path: Path) -> None:
    made = plan(small, tmp_path, "name: int8_dynamic", "lm_head", "model.embed_tokens", "'re:.*layers[.]0[.]mlp'")
    assert len(made.modules) == 7 * 3 - 3
    assert "model.layers.0.mlp.up_proj" not in made.modules
    assert made.ignore_matches["lm_head"] == ("lm_head",), "a tied head has no tensor, but is part of the model"
    assert set(made.ignore) == {"lm_head", *(f"model.layers.0.mlp.{p}_proj" for p in ("gate", "up", "down"))}
    tensors = made.layout.tensors
    assert tensors["model.layers.1.mlp.up_proj.weight"].dtype == "I8"
    assert tensors["model.layers.1.mlp.up_proj.weight_scale"].shape == (768, 1)
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == "BF16"
    assert "lm_head.weight" not in tensors
    codes = sum(m.rows * m.cols for m in made.modules.values())
    scales = sum(m.rows * 4 for m in made.modules.values())
    assert made.estimate.bits_per_weight == 8 * (codes + scales) / codes
    assert made.estimate.output_bytes == made.layout.file_bytes
    text = render_plan(made)
    assert "model.layers.*.self_attn.k_proj" in text and "128 x 256" in text


def test_routers_are_kept_and_experts_taken_whole(tmp_path: Path) -> None:
    made = plan(MOE, tmp_path, "scheme: W4A16", "lm_head")
    assert "model.layers.0.mlp.gate" in made.ignore
    assert "model.layers.0.mlp.experts.7.down_proj" in made.modules
    with pytest.raises(PlanError, match=r"takes model.layers.0.mlp.experts.3.up_proj out but leaves"):
        plan(MOE, tmp_path, "scheme: W4A16", "lm_head", "experts.3.up_proj")


@pytest.mark.parametrize(
    ("quantization", "ignore", "message"),
    [
        ("name: int8_dynamic", "lm_haed", r"'lm_haed' matches nothing in this model \(did you mean 'lm_head'\?\)"),
        ("name: int8_dynamic", "'re:('", r"'re:\(' is not a regular expression"),
        ("name: int8_dynamic", "layers", r"nothing is left to quantize: of 21 Linears"),
        ("name: int8_dynamic", "v_proj", r"takes model.layers.0.self_attn.v_proj out but leaves .*q_proj in"),
        ("name: int4, quant_method: {group_size: 512}", "lm_head", r"not divisible by 512 in .*in = 256\) x3; .*= 768"),
    ],
)
def test_refusals_name_what_and_what_to_do(
    small: Path, tmp_path: Path, quantization: str, ignore: str, message: str
) -> None:
    with pytest.raises(PlanError, match=message.replace("; .*= 768", "")) as caught:
        plan(small, tmp_path, quantization, ignore)
    if "512" in quantization:
        assert "group_size to 128" in str(caught.value) and "in = 768) x3" in str(caught.value)


def test_each_linear_gets_the_scheme_of_the_target_that_binds_strongest(small: Path, tmp_path: Path) -> None:
    made = planned(
        small,
        tmp_path,
        "{QuantizationModifier: {scheme: {W4A16: [Linear], FP8_DYNAMIC: ['re:.*down_proj']}, ignore: ['re:.*o_proj']}}",
        "{GPTQModifier: {scheme: W8A16, targets: [model.layers.1.mlp.down_proj]}}",
    )
    of = {name: (module.modifier.kind, module.scheme.name) for name, module in made.modules.items()}
    assert of["model.layers.0.mlp.up_proj"] == ("rtn", "W4A16")
    assert of["model.layers.0.mlp.down_proj"] == ("rtn", "FP8_DYNAMIC")
    assert of["model.layers.1.mlp.down_proj"] == ("gptq", "W8A16")
    assert set(made.ignore) == {"lm_head", *(f"model.layers.{i}.self_attn.o_proj" for i in range(3))}
    block = made.config_json["quantization_config"]
    targets = {t: group["format"] for group in block["config_groups"].values() for t in group["targets"]}
    assert block["format"] == "mixed-precision" and "Linear" not in targets
    assert targets["re:.*layers\\.\\d+\\.mlp\\.up_proj$"] == targets["model.layers.1.mlp.down_proj"] == "pack-quantized"
    assert targets["model.layers.0.mlp.down_proj"] == "float-quantized"
    assert made.layout.tensors["model.layers.0.mlp.down_proj.weight"].dtype == "F8_E4M3"
    assert made.record()["methods"]["model.layers.1.mlp.down_proj"] == "gptq"
    text = render_plan(made)
    assert "FP8_DYNAMIC: weights FP8 e4m3 per channel" in text and "gptq W8A16" in text


def test_one_scheme_by_two_methods_is_one_group(tmp_path: Path) -> None:
    gptq, rtn = "GPTQModifier: {scheme: W4A16, targets: 're:.*attn.*'}", "QuantizationModifier: {scheme: W4A16"
    made = planned(MOE, tmp_path, f"{{{gptq}}}", f"{{{rtn}, targets: 're:.*experts.*'}}}}")
    groups = made.config_json["quantization_config"]["config_groups"]
    assert [group["targets"] for group in groups.values()] == [["Linear"]]
    # Experts that differ by layer are found by a pattern for each layer.
    one = "QuantizationModifier: {scheme: {W8A16: ['re:.*layers[.]0[.]mlp'], W4A16: ['re:.*layers[.][12][.]mlp']}}"
    made = planned(MOE, tmp_path, f"{{{one}}}")
    groups = made.config_json["quantization_config"]["config_groups"]
    targets = next(group["targets"] for group in groups.values() if group["weights"]["num_bits"] == 8)
    assert "re:.*layers\\.0\\.mlp\\.experts\\.\\d+\\.up_proj$" in targets and len(targets) == 3


@pytest.mark.parametrize(
    ("modifier", "message"),
    [
        ("scheme: W8A8, targets: up_proj", r"targets: 'up_proj' matches no Linear .*; did you mean 're:\.\*up_proj\$'"),
        ("scheme: W8A8, targets: model.layers.0.mlp.up_prj", r"did you mean 'model.layers.0.mlp.up_proj'"),
        ("scheme: W8A8, targets: 're:.*upproj'", r"matches no Linear .*did you mean 'up_proj'"),
        ("scheme: W8A8, targets: lm_head", r"lm_head is the head, which stays in full precision"),
        ("scheme: W8A8, ignore: lm_haed", r"^ignore: 'lm_haed' matches nothing"),
        (
            "scheme: {W8A8: [Linear], W8A16: ['re:.*k_proj']}",
            r"q_proj has scheme W8A8 and .*k_proj has W8A16;",
        ),
        ("scheme: W8A8, targets: 're:.*gate_proj'", r"takes model.layers.0.mlp.up_proj out but leaves"),
        ("scheme: W8A8}}, {GPTQModifier: {scheme: W8A8", r"QuantizationModifier \(target 'Linear'\) and GPTQModifier"),
        (
            "kv_cache_scheme: {num_bits: 8, type: float, strategy: attn_head}",
            r"needs num_key_value_heads in config.json",
        ),
    ],
)
def test_what_a_recipe_may_not_say(small: Path, tmp_path: Path, modifier: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        planned(small, tmp_path, f"{{QuantizationModifier: {{{modifier}}}}}")


def test_smoothing_rewrites_what_is_not_quantized(tmp_path: Path) -> None:
    made = planned(MOE, tmp_path, "{AWQModifier: {}}", "{GPTQModifier: {scheme: W4A16, ignore: ['re:.*layers.2.*']}}")
    assert [p.layer for p in made.smoothings[0]] == sorted(p.layer for p in made.smoothings[0])
    assert {p.layer for p in made.smoothings[0]} == {0, 1}, "nothing is smoothed for layers that stay as they are"
    norms = {f"model.layers.{i}.{n}_layernorm.weight" for i in (0, 1) for n in ("input", "post_attention")}
    assert made.rewritten == norms | {f"model.layers.{i}.mlp.gate.weight" for i in (0, 1)}
    assert not made.rewritten & set(made.carried) and "model.layers.2.input_layernorm.weight" in made.carried
    rescaled = made.record()["rescaled"]
    expert = "model.layers.0.mlp.experts.3"
    assert [rescaled[f"{expert}.{p}_proj"] for p in ("gate", "up", "down")] == [
        "columns",
        "columns and rows",
        "columns",
    ]
    assert not [name for name in rescaled if name.startswith("model.layers.2.")]
    # Two square inputs and that of each of 8 experts' two, fp32; q, k and v share one, and so do gate and up.
    assert made.estimate.gram_bytes == 4 * 128 * 128 * (2 + 2 * 8)
    assert "of it for a layer's Gram matrices" in render_plan(made)


def test_activations_that_wait_are_counted(small: Path, tmp_path: Path) -> None:
    """4 rows of 64 tokens, bf16: the input of down_proj, the norm's output and the residual."""

    def made(modifier: str, forwards: int | str = "auto", model: Path = small) -> Plan:
        yaml = tmp_path / "job.yaml"
        yaml.write_text(
            f"global: {{save_path: {tmp_path}, calibration_forwards: {forwards}}}\nmodel: {{model_path: {model}}}\n"
            f"compression: {{recipe: {{quant_stage: {{quant_modifiers: [{modifier}]}}}}}}\n"
            "dataset: {data_path: job.yaml, max_seq_length: 64, num_samples: 4}"
        )
        with Checkpoint(model) as checkpoint:
            return build_plan(load_run_config(yaml), checkpoint)

    gptq, one, two = (made("{GPTQModifier: {scheme: W8A16}}", n) for n in ("auto", 1, 2))
    held = 4 * 64 * 2 * (768 + 2 * 256)
    assert gptq.estimate.held_bytes == one.estimate.held_bytes == held and two.estimate.held_bytes == 0
    assert gptq.estimate.memory_bytes == one.estimate.memory_bytes
    assert "655.4 kB for activations, one forward a layer" in render_plan(gptq)
    assert made("{AWQModifier: {scheme: W4A16}}").estimate.held_bytes == 0, "AWQ takes two"
    assert made("{QuantizationModifier: {scheme: W8A8_STATIC}}").estimate.held_bytes == 0, "nothing waits"
    assert made("{GPTQModifier: {scheme: W4A16}}", model=MOE).estimate.held_bytes == 0, "experts take two"


def test_a_cache_gets_its_scales(tmp_path: Path) -> None:
    made = planned(MOE, tmp_path, "{QuantizationModifier: {kv_cache_scheme: {num_bits: 8, strategy: attn_head}}}")
    assert not made.modules and made.attentions == tuple(f"model.layers.{i}.self_attn" for i in range(3))
    assert made.layout.tensors["model.layers.1.self_attn.v_scale"].shape == (2, 1, 1)
    assert made.config_json["quantization_config"]["kv_cache_scheme"]["strategy"] == "attn_head"
    assert "vLLM reads FP8 ones only" in made.warnings[0]


def test_other_refusals(small: Path, tmp_path: Path) -> None:
    config = {"model_type": "llama", "num_hidden_layers": 1, "quantization_config": {"quant_method": "gptq"}}
    done = write_headers(tmp_path / "done", config, [{"model.layers.0.mlp.up_proj.weight": ("BF16", (8, 8))}])
    with pytest.raises(PlanError, match=r"already quantized .*'gptq'"):
        plan(done, tmp_path, "name: int8_dynamic")
    with pytest.raises(ConfigError, match=r"save_name: unknown format 'compresed-tensors' .did you mean"):
        plan(small, tmp_path, "name: int8_dynamic, save_name: compresed-tensors")


def test_unknown_architectures_are_said_aloud(tmp_path: Path) -> None:
    config = {"model_type": "somebodys_own", "num_hidden_layers": 1}
    model = write_headers(tmp_path / "own", config, [{"model.layers.0.mlp.up_proj.weight": ("BF16", (64, 64))}])
    assert "'somebodys_own' is not in quantkit's table" in plan(model, tmp_path, "name: int8_dynamic").warnings[0]


def test_tensor_parallel_sizes_that_do_not_divide_are_warned_of(small: Path, tmp_path: Path) -> None:
    warnings = plan(small, tmp_path, "scheme: W4A16", "lm_head").warnings
    assert [re.findall(r"size (\d)", w)[0] for w in warnings] == ["4", "8"]
    assert "model.layers.*.self_attn.o_proj (256 / 4 by 128) x3" in warnings[0]
    assert plan(small, tmp_path, "name: int8_dynamic", "lm_head").warnings == ()


def test_a_lack_of_disk_stops_the_run_but_not_the_plan(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1 << 20

    monkeypatch.setattr("quantkit.estimate.shutil.disk_usage", lambda path: Usage)
    made = plan(small, tmp_path, "name: int8_dynamic", "lm_head")
    with pytest.raises(PlanError, match=r"the output takes 0.1 GB and only 0.0 GB are free"):
        made.require_room()


def test_a_70b_sized_model_is_planned_in_three_seconds(tmp_path: Path) -> None:
    model = llama(tmp_path / "70b", hidden=8192, intermediate=28672, layers=80, kv=1024, vocab=128256)
    yaml = tmp_path / "job.yaml"
    yaml.write_text("compression: {name: PTQ, quantization: {scheme: W4A16, ignore_layers: [lm_head]}}\n")
    command = [sys.executable, "-m", "quantkit", "plan", "-c", str(yaml), "--model-path", str(model)]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    took = time.perf_counter() - started
    assert "141.1 GB -> 39.5 GB, 4.13 bits" in done.stdout, done.stdout + done.stderr
    # The machine may be busy with other tests; alone it takes a fifth of this.
    assert took < 3.0, f"{took:.1f} s"
