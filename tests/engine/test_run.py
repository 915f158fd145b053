"""Whole runs on the embedded models: the command line, the two formats, the audit, and what is left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantkit import engine
from quantkit.audit import audit
from quantkit.checkpoint.reader import Checkpoint
from quantkit.cli import main
from quantkit.config.yaml_file import load_run_config
from quantkit.errors import CheckpointError

from ..e2e.jobs import EXAMPLES, quantize

LLAMA = EXAMPLES / "models" / "tiny-llama"

# The `compression` and `dataset` sections of AngelSlim's INT8 and FP8 documentation, as they are written there.
INT8 = """
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
FP8 = (
    INT8.replace("int8_dynamic ", "fp8_dynamic ")
    .replace("per-channel", "per-tensor")
    .replace("per-token", "per-tensor")
)
FP8_LOW_MEMORY = (
    FP8.replace("name: quantization", "name: PTQ")
    .replace("name: fp8_dynamic", "name: fp8_static")
    .replace("    bits: 8 ", "    low_memory: True  # Use less gpu/cpu memory\n    bits: 8 ")
    + f"""
dataset:
  name: TextDataset
  data_path: {EXAMPLES / "data" / "calibration.jsonl"}
  max_seq_length: 4096
  num_samples: 16
  batch_size: 1
"""
)


@pytest.mark.parametrize(("name", "yaml"), [("int8", INT8), ("fp8", FP8), ("fp8_low_memory", FP8_LOW_MEMORY)])
def test_angelslims_examples_run_as_written(
    name: str, yaml: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / f"{name}.yaml").write_text(yaml)
    command = ["run", "-c", str(tmp_path / f"{name}.yaml"), "--model-path", str(LLAMA), "--save-path", str(tmp_path)]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "audit PASSED: 28 quantized weights, 10 tensors carried over" in out
    config = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert config["ignored_layers"] == ["lm_head", "model.embed_tokens"]
    assert main(command) == 2, "a finished output is not overwritten"
    assert "--overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0


def test_tools_run_py_is_the_same_command(tmp_path: Path) -> None:
    (tmp_path / "int8.yaml").write_text(INT8)
    script = EXAMPLES.parent / "tools" / "run.py"
    command = [sys.executable, str(script), "-c", str(tmp_path / "int8.yaml"), "--model-path", str(LLAMA)]
    done = subprocess.run([*command, "--save-path", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "int8" / "model.safetensors").exists()


def test_everything_else_is_carried_over(tmp_path: Path) -> None:
    output = quantize("tiny-llama", "int8_dynamic", tmp_path)
    assert {p.name for p in output.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "quantkit_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    source, written = load_file(LLAMA / "model.safetensors"), load_file(output / "model.safetensors")
    assert "lm_head.weight" not in written, "tied embeddings stay tied"
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.2.input_layernorm.weight"):
        assert torch.equal(source[name], written[name])
    with safe_open(output / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    record = json.loads((output / "quantkit_config.json").read_text())
    assert record["config"]["model"]["model_path"] == "tiny-llama", "no path of this machine is published"


def test_shards_and_one_file_hold_the_same(tmp_path: Path) -> None:
    one = load_file(quantize("tiny-llama", "int4", tmp_path) / "model.safetensors")
    (tmp_path / "sharded").mkdir()
    sharded = quantize("tiny-llama", "int4", tmp_path / "sharded", "global.max_shard_size=1MB")
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in one.values())
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(sharded / file)[name], one[name]), name


def test_static_scales_are_shared_by_linears_that_read_one_input(tmp_path: Path) -> None:
    tensors = load_file(quantize("tiny-llama", "int8_static", tmp_path) / "model.safetensors")
    for layer in range(4):
        q, k, v, o = (tensors[f"model.layers.{layer}.self_attn.{p}_proj.input_scale"] for p in "qkvo")
        assert torch.equal(q, k) and torch.equal(q, v) and not torch.equal(q, o)
        gate, up = (tensors[f"model.layers.{layer}.mlp.{p}_proj.input_scale"] for p in ("gate", "up"))
        assert torch.equal(gate, up)


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    outputs = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        outputs.append(quantize("tiny-moe", "fp8_static", tmp_path / name))
    for path in outputs[0].glob("*.safetensors"):
        assert path.read_bytes() == (outputs[1] / path.name).read_bytes()


def test_save_name_fp8_is_angelslims_config_and_vllms_tensors(tmp_path: Path) -> None:
    output = quantize("tiny-llama", "fp8_static", tmp_path, "compression.quantization.save_name=fp8")
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    assert config == {"activation_scheme": "static", "ignored_layers": ["lm_head"], "quant_method": "fp8"}
    tensors = load_file(output / "model.safetensors")
    prefix = "model.layers.0.mlp.up_proj"
    assert tensors[f"{prefix}.weight"].dtype == torch.float8_e4m3fn
    assert tensors[f"{prefix}.weight_scale"].shape == tensors[f"{prefix}.input_scale"].shape == (1,)


def test_nan_in_a_weight_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    tensors = load_file(LLAMA / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][5, 7] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    (broken / "config.json").write_text((LLAMA / "config.json").read_text())
    (tmp_path / "job.yaml").write_text(INT8)
    config = load_run_config(tmp_path / "job.yaml", model_path=str(broken), save_path=str(tmp_path))
    with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.up_proj: NaN or Inf in row 5 of 768"):
        engine.run(config)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken", "job.yaml"]


def test_a_killed_run_leaves_no_output_and_can_be_repeated(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(FP8_LOW_MEMORY)
    command = [sys.executable, "-m", "quantkit", "run", "-c", str(tmp_path / "job.yaml")]
    command += ["--model-path", str(LLAMA), "--save-path", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("job.partial*")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "job").exists()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "job" / "config.json").exists()
    assert not list(tmp_path.glob("job.partial*"))


def tampered(output: Path, change: str) -> None:
    """Write the output's weights again with one thing wrong."""
    path = output / "model.safetensors"
    tensors = load_file(path)
    up = "model.layers.0.mlp.up_proj"
    if change == "missing":
        del tensors[f"{up}.weight_scale"]
    elif change == "shape":
        tensors[f"{up}.weight_scale"] = tensors[f"{up}.weight_scale"].reshape(-1)
    elif change == "scale":
        tensors[f"{up}.weight_scale"][3] *= 1.5
    elif change == "code":
        tensors[f"{up}.weight"][3, 4] += 2
    elif change == "nan":
        tensors[f"{up}.weight_scale"][0] = float("nan")
    elif change == "carried":
        tensors["model.norm.weight"][0] += 1
    else:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("missing", "up_proj"),
        ("shape", r"weight_scale: F32 \[768\], expected F32 \[768, 1\]"),
        ("scale", r"mlp.up_proj: max .error. .* is above"),
        ("code", r"mlp.up_proj: max .error. .* is above"),
        ("nan", "weight_scale: has values that are not finite and positive"),
        ("carried", "model.norm.weight: carried over, but its bytes differ"),
        ("extra", "lm_head.weight: not in the source"),
    ],
)
def test_the_audit_finds(change: str, problem: str, tmp_path: Path) -> None:
    output = quantize("tiny-llama", "int8_dynamic", tmp_path)
    tampered(output, change)
    with Checkpoint(LLAMA) as source:
        result = audit(output, source)
    assert not result.ok
    assert any(re.search(problem, p) for p in result.problems), result.problems
    report = tmp_path / "audit.json"
    assert main(["audit", str(output), "--source", str(LLAMA), "--json", str(report)]) == 1
    assert json.loads(report.read_text())["ok"] is False


def test_eval_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = quantize("tiny-llama", "int8_dynamic", tmp_path)
    text = str(EXAMPLES / "data" / "evaluation.txt")
    assert main(["eval", str(output), "--text", text, "--reference", str(LLAMA), "--windows", "4"]) == 0
    out = capsys.readouterr().out
    assert "perplexity" in out and "KL per token" in out and "top-1 agreement" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "-c", "nowhere.yaml"], "nowhere.yaml"),
        (["audit", "nowhere", "--source", str(LLAMA / "nope")], "nope"),
        (["eval", str(LLAMA), "--text", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_errors_are_sentences(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err and err.startswith(f"quantkit {arguments[0]}: error: ")


def test_help_is_quick() -> None:
    times = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "quantkit", "--help"], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.3, times
    code = "import sys, quantkit; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=dict(os.environ)).returncode == 0
