"""Runs jobs in several processes, as torchrun does, and one after the other in each, so that they start but once."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..e2e.jobs import EXAMPLES
from .tiny import make

JOBS = {
    "gptq": ("tiny-llama", "{GPTQModifier: {scheme: W4A16}}"),
    "smoothed": (
        "tiny-llama",
        "{SmoothQuantModifier: {smoothing_strength: 0.8}, GPTQModifier: {scheme: W8A8}}",
    ),
    "awq": ("tiny-llama", "{AWQModifier: {scheme: W4A16_ASYM}}"),
    "fp8": ("tiny-llama", "{QuantizationModifier: {scheme: FP8, kv_cache_scheme: fp8}}"),
    "int8": (
        "tiny-llama",
        "{QuantizationModifier: {scheme: W8A8_STATIC, input_observer: moving_average}}",
    ),
    "histogram": ("tiny-llama", "{QuantizationModifier: {scheme: W8A8_STATIC_ASYM, input_observer: kl}}"),
    "experts": ("tiny-moe", "{GPTQModifier: {scheme: W4A16}}"),
    "few tokens": ("tiny-moe", "{GPTQModifier: {scheme: W4A16, min_tokens_per_module: 2000}}"),
    "in groups": ("tiny-moe", "{GPTQModifier: {scheme: W8A8}}"),
    "experts fp8": ("tiny-moe", "{QuantizationModifier: {scheme: FP8}}"),
    "two forwards": ("tiny-llama", "{GPTQModifier: {scheme: W4A16, actorder: group}}"),
    "on disk": ("tiny-llama", "{GPTQModifier: {scheme: W4A16_ASYM}}"),
    "gptq fp4": ("tiny-moe", "{GPTQModifier: {scheme: NVFP4}}"),
    "gptq fp8": ("tiny-llama", "{GPTQModifier: {scheme: FP8_BLOCK}}"),
    "every expert": ("tiny-moe", "{GPTQModifier: {scheme: W4A16, moe_calibrate_all_experts: true}}"),
    "level": ("tiny-llama", "{QuantizationModifier: {scheme: FP8}}"),
    "attention": (
        "tiny-llama",
        "{GPTQModifier: {config_groups: {linears: {targets: [Linear], weights: {num_bits: 4, group_size: 32}}, "
        "attention: {targets: [LlamaAttention], input_activations: {num_bits: 8, type: float, strategy: attn_head}}}}}",
    ),
    "attention experts": (
        "tiny-moe",
        "{QuantizationModifier: {config_groups: {attention: {targets: [Attention], input_activations: {num_bits: 8, "
        "type: float, strategy: tensor}}, linears: {targets: [Linear], weights: {num_bits: 8, strategy: channel}}}}}",
    ),
    "awq experts": ("tiny-moe", "{AWQModifier: {scheme: W4A16_ASYM, clip: true}}"),
    "smoothed experts": (
        "tiny-moe",
        "{SmoothQuantModifier: {smoothing_strength: 0.5, mappings: "
        "[[['re:.*mlp.gate$', 're:.*(gate|up)_proj$'], post_attention_layernorm]]}, "
        "GPTQModifier: {scheme: W8A8_STATIC, min_tokens_per_module: 2000}}",
    ),
    "awq, all tokens": (
        "tiny-moe",
        "{AWQModifier: {n_grid: 4}, GPTQModifier: {scheme: W4A16, moe_calibrate_all_experts: true}}",
    ),
    "parent": (
        "tiny-moe",
        "{AWQModifier: {scheme: W4A16, loss: parent, n_grid: 3, mappings: [[['re:.*[qkv]_proj$'], input_layernorm]]}}",
    ),
    "awq shared experts": ("deepseek_v3", "{AWQModifier: {scheme: W4A16_CHANNEL_ASYM}}"),
    "silent experts": ("mixtral", "{AWQModifier: {n_grid: 4}, GPTQModifier: {scheme: W4A16_CHANNEL}}"),
    "inner": ("tiny-moe", "{AWQModifier: {scheme: W4A16, mappings: [[['re:.*down_proj$'], 're:.*up_proj$']]}}"),
    "free": ("tiny-moe", "{QuantizationModifier: {scheme: FP8_DYNAMIC}}"),
}


# Too few for some expert to get a token.
SAMPLES = {"silent experts": 1}
# What else stands in a job's section `compression`, and in front of `save_path`.
COMPRESSION = {"level": "disable_level: L2, "}
MORE = {
    "two forwards": "global: {calibration_forwards: 2, ",
    "on disk": "calibration: {offload: disk}\nglobal: {",
    "in groups": "calibration: {offload: disk}\nglobal: {",
}


def yaml_of(job: str, folder: Path, save: Path) -> Path:
    """The job as a file in `folder`, its output below `save`."""
    model, modifiers = JOBS[job]
    where = EXAMPLES / "models" / model
    if not where.exists():  # one of random weights
        where = folder / model
        make(where, model, vocab_size=2048)
        for path in (EXAMPLES / "models" / "tiny-llama").glob("tokenizer*"):
            shutil.copy(path, where)
    path = folder / f"{job}.yaml"
    path.write_text(
        f"""
{MORE.get(job, "global: {")}save_path: {save}, max_shard_size: 200KB}}
model: {{model_path: {where}}}
compression: {{{COMPRESSION.get(job, "")}recipe: {{quant_stage: {{quant_modifiers: {modifiers}}}}}}}
dataset:
  name: TextDataset
  data_path: {EXAMPLES / "data" / "calibration.jsonl"}
  max_seq_length: 128
  num_samples: {SAMPLES.get(job, 40)}
"""
    )
    return path


def environments(ranks: int) -> list[dict[str, str]]:
    """What torchrun sets for each process."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    common = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if ranks == 1:
        return [{**os.environ, **common}]
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    return [{**os.environ, **common, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(ranks)]


def start(command: Sequence[str], ranks: int) -> list[subprocess.Popen[str]]:
    """`ranks` processes of `python command...`."""
    return [
        subprocess.Popen([sys.executable, *command], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for env in environments(ranks)
    ]


def ended(processes: Sequence[subprocess.Popen[str]], timeout: float = 120) -> list[tuple[int, str, str]]:
    """Exit status, standard output and error of each; none is left behind."""
    try:
        found = []
        for process in processes:
            out, error = process.communicate(timeout=timeout)
            found.append((process.returncode, out, error))
        return found
    finally:
        for process in processes:
            process.kill()


RUN_ALL = """
import sys
from quantkit import engine
from quantkit.config.yaml_file import load_run_config
for path in sys.argv[1:]:
    engine.run(load_run_config(path), progress=False)
"""


def run_all(jobs: Sequence[str], ranks: int, folder: Path) -> dict[str, dict[str, bytes]]:
    """Every file of each job's output."""
    folder.mkdir()
    paths = [str(yaml_of(job, folder, folder / "out")) for job in jobs]
    for status, _, error in ended(start(["-c", RUN_ALL, *paths], ranks)):
        assert status == 0, error
    return {job: files(folder / "out" / job) for job in jobs}


def files(output: Path) -> dict[str, bytes]:
    """All bytes of a folder."""
    return {str(p.relative_to(output)): p.read_bytes() for p in sorted(output.rglob("*")) if p.is_file()}


def differences(a: Mapping[str, bytes], b: Mapping[str, bytes]) -> list[str]:
    """Names of files that are not the same in both."""
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
