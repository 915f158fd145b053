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


def plan(model: Path, folder: Path, quantization: str, *ignore: str, dataset: str = "") -> Plan:
    yaml = folder / "job.yaml"
    yaml.write_text(
        f"global: {{save_path: {folder}}}\nmodel: {{model_path: {model}}}\n"
        f"compression: {{name: PTQ, quantization: {{{quantization}, ignore_layers: [{', '.join(ignore)}]}}}}\n{dataset}"
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
