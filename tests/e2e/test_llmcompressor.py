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
import transformers
from safetensors.torch import load_file, save_file

from quantkit import oneshot
from quantkit.checkpoint.reader import Checkpoint
from quantkit.conformance import check_folder
from quantkit.evaluate import compare, open_source
from quantkit.formats.source import WeightSource
from quantkit.modifiers import QuantizationModifier

from ..engine.stacked import stack
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


def global_scales(model: Path, weights: Path | None = None) -> dict[str, float]:
    """NVFP4's input scales by Transformers in fp64: 448 * 6 over the largest input of each Linear of `model`, with the
    dequantized weights of the folder `weights` in it if given.
    """
    found: dict[str, float] = {}

    def hook(name: str, inputs: torch.Tensor) -> None:
        found[name] = max(found.get(name, 0.0), float(inputs.abs().max()))

    # fp32 first, as config.json has it: rotary tables are computed in fp32 by both tools.
    network = transformers.AutoModelForCausalLM.from_pretrained(model).double()
    if weights is not None:
        with Checkpoint(weights) as checkpoint:
            source = WeightSource(checkpoint)
            for name in source.modules:
                network.get_submodule(name).weight.data = source.get(f"{name}.weight").double()
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(lambda _, inputs, name=name: hook(name, inputs[0]))
    with torch.inference_mode():
        for row in ROWS:
            network(torch.tensor([row]))
    return {f"{name}.input_global_scale": 448 * 6 / amax for name, amax in found.items()}


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
    inputs = [name for name in stored if name.endswith("input_global_scale")]
    for name in set(stored) - set(inputs):
        assert torch.equal(theirs[name].view(torch.uint8), found[name].view(torch.uint8)), name
    # llm-compressor looks at the inputs of the plain model (its sweep runs with quantization disabled, and rounding to
    # nearest leaves weights alone until the end), quantkit at those that the rounded weights make, which are served.
    # Each is exact: 16 Linears in a row, fp32 sums of at most 768 terms whose errors add up like a walk.
    bound = 16 * 768**0.5 * 2**-24
    for tensors, weights in ((theirs, None), (found, tmp_path / "ours")):
        scales = global_scales(model, weights) if inputs else {}
        for name in inputs:
            assert float(tensors[name]) == pytest.approx(scales[name], rel=bound), name
    for who in ("theirs", "ours"):
        for client in ("vllm", "transformers"):
            verdict = check_folder(tmp_path / who, client)
            assert verdict.ok, verdict.render()
    windows = [row[:32] for row in ROWS]
    figures = [
        compare([model, model], [open_source(tmp_path / who), open_source(model)], windows, progress=False)
        for who in ("theirs", "ours")
    ]
    # Other input scales are another draw of the activations' rounding: a token's log probability has a variance of
    # twice the KL divergence that it makes, in each of the two. Four standard deviations of the mean.
    same = 4 * (4 * figures[1]["kl"] / (len(windows) * 31)) ** 0.5 if inputs else 1e-6
    assert figures[0]["perplexity"] == pytest.approx(figures[1]["perplexity"], rel=same)
    told = f", llm-compressor's {figures[0]['perplexity']:.4f}" if inputs else ""
    print(f"{scheme}: {len(stored)} tensors, perplexity {figures[1]['perplexity']:.4f}{told}")


@pytest.mark.parametrize("strategy", ["tensor", "attn_head"])
def test_scales_of_keys_and_values(strategy: str, tmp_path: Path) -> None:
    """A group for attention: the same config block, and the same scales but for queries', which it leaves as they were
    in memory. Its own default is a moving average.
    """
    model = source(tmp_path / "model")
    args = {"num_bits": 8, "type": "float", "strategy": strategy, "observer": "static_minmax"}
    groups = {"attention": {"targets": ["LlamaAttention"], "input_activations": args}}
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    command = [PYTHON, str(SCRIPT), str(model), str(tmp_path / "theirs"), str(tmp_path / "rows.json")]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    recipe = json.dumps({"QuantizationModifier": {"config_groups": groups}})
    subprocess.run([*command, recipe], check=True, capture_output=True, env=environment)
    oneshot(
        str(model),
        recipe=QuantizationModifier(config_groups=groups),
        dataset=ROWS,
        output_dir=str(tmp_path / "ours"),
    )
    theirs, found = (load_file(tmp_path / who / "model.safetensors") for who in ("theirs", "ours"))
    zeros = {name for name in theirs if name.endswith("_zero_point")}
    assert set(theirs) - zeros - {"lm_head.weight"} == set(found)
    scales = [name for name in found if name.endswith(("k_scale", "v_scale"))]
    off = max(float((theirs[name] / found[name] - 1).abs().max()) for name in scales)
    # fp32 as in `test_same_bits`.
    assert len(scales) == 8 and off < 16 * 768**0.5 * 2**-24
    queries = [name for name in found if name.endswith("q_scale")]
    assert all(theirs[name].shape == found[name].shape for name in queries)
    calibrated = [torch.allclose(theirs[name], found[name], rtol=0.5) for name in queries]
    assert not any(calibrated), "llm-compressor calibrates queries by now; docs/outputs.md says that it does not"
    blocks = [json.loads((tmp_path / who / "config.json").read_text()) for who in ("theirs", "ours")]
    entries = [block["quantization_config"]["config_groups"]["group_0"] for block in blocks]
    told = ("num_bits", "type", "strategy", "symmetric", "dynamic", "group_size", "block_structure")
    for entry, block in zip(entries, blocks, strict=True):
        scheme = block["quantization_config"]["kv_cache_scheme"]
        entry["input_activations"] = {key: entry["input_activations"][key] for key in told}
        assert {key: scheme[key] for key in told} == entry["input_activations"]
    assert entries[0] == entries[1]
    print(
        f"{strategy}: scales of keys and values within {off:.1e}; theirs of queries {theirs[queries[0]].flatten()[:2]}"
    )


@pytest.mark.parametrize("model_type", ["gpt_oss", "qwen3_5_moe_text"])
def test_experts_stored_as_one_tensor_become_the_same_tensors(model_type: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    sizes = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128, "head_dim": 32}
    stack(model, model_type, **sizes)
    for file in (EXAMPLES / "models" / "tiny-llama").glob("token*"):
        shutil.copy(file, model)
    rows = [[(7 * i + 3 * j) % 120 + 3 for j in range(32)] for i in range(4)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    ignore = ["lm_head", "re:.*shared_expert_gate", "re:.*router"]
    recipe = {"QuantizationModifier": {"targets": ["Linear"], "scheme": "FP8_DYNAMIC", "ignore": ignore}}
    command = [PYTHON, str(SCRIPT), str(model), str(tmp_path / "theirs"), str(tmp_path / "rows.json")]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([*command, json.dumps(recipe)], check=True, capture_output=True, env=environment)
    ours = QuantizationModifier(targets=["Linear"], scheme="FP8_DYNAMIC", ignore=["lm_head"])
    oneshot(str(model), recipe=ours, output_dir=str(tmp_path / "ours"))
    theirs, found = (load_file(tmp_path / who / "model.safetensors") for who in ("theirs", "ours"))
    assert set(theirs) == set(found) and any("experts.3.down_proj.weight_scale" in name for name in found)
    for name, tensor in found.items():
        assert torch.equal(theirs[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
