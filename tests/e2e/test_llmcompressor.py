"""The same codes and scales as llm-compressor's, to the bit, where rounding to nearest leaves no choice. It pins its
dependencies: QUANTKIT_LLMCOMPRESSOR_PYTHON names an interpreter that has it; without one the tests are skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit import oneshot
from quantkit.conformance import check_folder
from quantkit.evaluate import compare, open_source
from quantkit.modifiers import QuantizationModifier

from .jobs import EXAMPLES

PYTHON = os.environ.get("QUANTKIT_LLMCOMPRESSOR_PYTHON", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="QUANTKIT_LLMCOMPRESSOR_PYTHON names no interpreter with llmcompressor"),
]
SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "peer_oneshot.py"
ROWS = [[(7 * i + 3 * j) % 2000 + 3 for j in range(64)] for i in range(16)]


def source(to: Path) -> Path:
    """tiny-llama in fp32: llm-compressor computes NVFP4's scales in the model's dtype, quantkit always in fp32."""
    shutil.copytree(EXAMPLES / "models" / "tiny-llama", to)
    tensors = {name: tensor.float() for name, tensor in load_file(to / "model.safetensors").items()}
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((to / "config.json").read_text())
    config.update({key: "float32" for key in ("dtype", "torch_dtype") if key in config})
    (to / "config.json").write_text(json.dumps(config))
    return to


@pytest.mark.parametrize("scheme", ["MXFP4", "MXFP4A16", "MXFP8", "MXFP8A16", "NVFP4", "NVFP4A16"])
def test_same_bits(scheme: str, tmp_path: Path) -> None:
    model = source(tmp_path / "model")
    recipe = {"QuantizationModifier": {"targets": ["Linear"], "scheme": scheme, "ignore": ["lm_head"]}}
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    command = [PYTHON, str(SCRIPT), str(model), str(tmp_path / "theirs"), str(tmp_path / "rows.json")]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([*command, json.dumps(recipe)], check=True, capture_output=True, env=environment)
    ours = QuantizationModifier(targets=["Linear"], scheme=scheme, ignore=["lm_head"])
    oneshot(str(model), recipe=ours, dataset=ROWS, output_dir=str(tmp_path / "ours"))
    theirs, found = (load_file(tmp_path / who / "model.safetensors") for who in ("theirs", "ours"))
    stored = [name for name in found if name.rpartition(".")[2].startswith(("weight_", "input_"))]
    assert set(theirs) - {"lm_head.weight"} == set(found)
    for name in stored:
        if name.endswith("input_global_scale"):
            # Theirs sees what layers before it make of rounded activations, too.
            first = ".layers.0.self_attn." in name and "o_proj" not in name
            torch.testing.assert_close(theirs[name], found[name], rtol=1e-5 if first else 0.1, atol=0)
        else:
            assert torch.equal(theirs[name].view(torch.uint8), found[name].view(torch.uint8)), name
    for who in ("theirs", "ours"):
        for client in ("vllm", "transformers"):
            verdict = check_folder(tmp_path / who, client)
            assert verdict.ok, verdict.render()
    windows = [row[:32] for row in ROWS]
    figures = [
        compare([model, model], [open_source(tmp_path / who), open_source(model)], windows, progress=False)
        for who in ("theirs", "ours")
    ]
    same = 0.01 if scheme == "NVFP4" else 1e-6
    assert figures[0]["perplexity"] == pytest.approx(figures[1]["perplexity"], rel=same)
    print(f"{scheme}: {len(stored)} tensors, perplexity {figures[1]['perplexity']:.4f}")
