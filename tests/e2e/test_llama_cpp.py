"""llama.cpp's converter as a second decoder: it turns what quantkit writes into a GGUF of fp32, whose numbers are those
of quantkit's own reader. QUANTKIT_LLAMA_CPP names the folder with its convert_hf_to_gguf.py and gguf-py (in the source
of llama-cpp-python: vendor/llama.cpp); without it the tests are skipped.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quantkit.checkpoint.reader import Checkpoint
from quantkit.formats.source import WeightSource

from .jobs import RECIPES, SCHEMES, quantize, quantize_by

SOURCE = os.environ.get("QUANTKIT_LLAMA_CPP", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SOURCE, reason="QUANTKIT_LLAMA_CPP does not name a folder with convert_hf_to_gguf.py"),
]
PEER = Path(__file__).with_name("peer_llama_cpp.py")
RTN = "{{QuantizationModifier: {{scheme: {}}}}}".format
ORDERED = "{GPTQModifier: {scheme: W4A16, actorder: group}}"

# (model, a name in SCHEMES or RECIPES, or modifiers, save_name), by what the test is called
Job = tuple[str, str, str]
TAKEN: dict[str, Job] = {
    **{
        name: ("tiny-llama", name, "")
        for name in (
            *("W8A8", "W8A8_ASYM", "FP8_DYNAMIC", "FP8_BLOCK", "W4A16", "W4A16_ASYM", "W8A16", "W8A16_ASYM", "W4AFP8"),
            *("NVFP4", "NVFP4A16", "smoothed", "negative scales"),
        )
    },
    "W4A8": ("tiny-llama", RTN("W4A8"), "compressed-tensors"),
    "gptq": ("tiny-llama", "{GPTQModifier: {scheme: W4A16}}", "gptq"),
    "gptq in order": ("tiny-llama", ORDERED, "gptq"),
    "gptq_v2": ("tiny-llama", RTN("W4A16_ASYM"), "gptq"),
    "gptq int8": ("tiny-llama", RTN("W8A16"), "gptq"),
    "gptq_v2 int8": ("tiny-llama", RTN("W8A16_ASYM"), "gptq"),
    "fp8 per block": ("tiny-llama", RTN("FP8_BLOCK"), "fp8"),
    "experts W4A16": ("tiny-moe", RTN("W4A16"), "compressed-tensors"),
    "experts W8A8": ("tiny-moe", RTN("W8A8"), "compressed-tensors"),
    "experts NVFP4A16": ("tiny-moe", RTN("NVFP4A16"), "compressed-tensors"),
    "experts gptq": ("tiny-moe", RTN("W4A16"), "gptq"),
    "experts fp8 per block": ("tiny-moe", RTN("FP8_BLOCK"), "fp8"),
}
LEFT_OVER = "Can not map tensor 'model.layers.0.*"
# With what it stops; an AssertionError without words is its own check of the strategy.
REFUSED: dict[str, tuple[Job, str]] = {
    "a static input": (("tiny-llama", "int8_static", ""), LEFT_OVER + "input_scale"),
    "one scale for a weight": (("tiny-llama", "FP8", ""), "AssertionError"),
    "int4 per channel": (("tiny-llama", RTN("W4A16_CHANNEL"), "compressed-tensors"), "AssertionError"),
    "columns in an order": (("tiny-llama", "groups in order", ""), LEFT_OVER + "weight_g_idx"),
    "scales of a cache": (("tiny-llama", "FP8 cache per head", ""), LEFT_OVER + "k_scale"),
    "two schemes": (("tiny-llama", "fp8 and int4", ""), "multiple config groups"),
    "MXFP8": (("tiny-llama", "MXFP8", ""), "'mxfp8-quantized' .* not yet supported"),
    "MXFP4": (("tiny-llama", "MXFP4", ""), "'mxfp4-pack-quantized' .* not yet supported"),
    "awq": (("tiny-llama", RTN("W4A16_ASYM"), "awq"), "'awq'"),
    "fp8 per tensor": (("tiny-llama", RTN("FP8"), "fp8"), LEFT_OVER + "input_scale"),
}

# A layer's tensors in a GGUF -> in a checkpoint
NAMES = {
    **{f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"},
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
    **{f"attn_{part}_norm": f"self_attn.{part}_norm" for part in "qk"},
    "ffn_gate_inp": "mlp.gate",
}
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
Converted = Callable[[str], tuple[Path, dict[str, Any], Path]]


@pytest.fixture(scope="module")
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """The folder that a job wrote, what the converter told of it, and its numbers; all that is tested at once."""
    asked = [item.callspec.params["name"] for item in request.session.items if item.fspath == Path(__file__)]
    root = tmp_path_factory.mktemp("gguf")
    known = TAKEN | {name: job for name, (job, _) in REFUSED.items()}
    folders, jobs = {}, {}
    for number, name in enumerate(asked):
        folder = root / str(number)
        folder.mkdir()
        folders[name] = _made(*known[name], folder)
        jobs[str(folders[name])] = str(folder / "numbers.safetensors")
    (root / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, str(PEER), SOURCE, str(root / "jobs.json")], capture_output=True, text=True, cwd=root
    )
    lines = [json.loads(line.partition("RESULT ")[2]) for line in done.stdout.splitlines() if "RESULT {" in line]
    assert len(lines) == len(jobs), done.stderr[-3000:]
    told = {line["folder"]: line for line in lines}
    return lambda name: (folders[name], told[str(folders[name])], Path(jobs[str(folders[name])]))


def _made(model: str, what: str, save_name: str, folder: Path) -> Path:
    if what in SCHEMES:
        return quantize(model, what, folder)
    if what in RECIPES:
        return quantize_by(model, RECIPES[what], folder)
    return quantize_by(model, what, folder, f"compression.save_name={save_name}")


def renamed(numbers: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a GGUF by the names of a checkpoint, stacked experts one by one."""
    found = {}
    for name, tensor in numbers.items():
        stem, _, part = name.rpartition(".")
        if stem in OUTER:
            found[f"{OUTER[stem]}.{part}"] = tensor
            continue
        block, layer, inner = stem.split(".", 2)
        assert block == "blk", name
        prefix = f"model.layers.{layer}"
        expert = re.fullmatch(r"ffn_(gate|up|down)_exps", inner)
        if expert is None:
            found[f"{prefix}.{NAMES[inner]}.{part}"] = tensor
        else:
            names = [f"{prefix}.mlp.experts.{i}.{expert[1]}_proj.{part}" for i in range(len(tensor))]
            found |= dict(zip(names, tensor, strict=True))
    return found


@pytest.mark.parametrize("name", TAKEN)
def test_the_same_numbers(name: str, converted: Converted) -> None:
    folder, told, path = converted(name)
    assert "error" not in told, told["error"]
    nvfp4 = "NVFP4" in name
    assert told["types"] == (["NVFP4"] if nvfp4 else [])
    numbers = renamed(load_file(path))
    inputs = {key: numbers.pop(key) for key in list(numbers) if key.endswith(".input_scale")}
    with Checkpoint(folder) as checkpoint:
        source = WeightSource(checkpoint)
        wanted = {key: source.get(key).float() for key in source.names()}
        for key, scale in inputs.items():
            stored = f"{key.removesuffix('.input_scale')}.input_global_scale"
            # What A16 schemes do not have, the converter takes for 1.
            expected = 1 / checkpoint.tensor(stored) if stored in checkpoint.tensors else torch.ones(scale.numel())
            assert torch.equal(scale.reshape(-1), expected), key
    assert numbers.keys() == wanted.keys()
    assert {f"{module}.weight" for module in source.modules} <= numbers.keys()
    for key, tensor in numbers.items():
        if nvfp4 and key.removesuffix(".weight") in source.modules:
            # code * local * (1 / global) here, code * (local / global) there: three roundings of fp32 each at most.
            torch.testing.assert_close(tensor, wanted[key], rtol=6 * 2**-24, atol=0)
        else:
            assert torch.equal(tensor, wanted[key]), key
    print(f"{name}: {len(source.modules)} Linears, {len(numbers)} tensors equal")


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_refuses(name: str, converted: Converted) -> None:
    _, told, _ = converted(name)
    assert re.search(REFUSED[name][1], told.get("error", "")), told
    print(f"{name}: {told['error']}")
