"""`quantkit check --for sglang` says what SGLang's own classes say: they are asked for the scheme of each config group
that quantkit writes, and their loaders are handed a static int8 checkpoint. Without the plugin; skipped without
QUANTKIT_SGLANG_PYTHON, as test_sglang_plugin.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantkit.config.presets import PRESETS
from quantkit.conformance import check_folder

from .jobs import quantize_by, refused_parts
from .test_sglang_plugin import LAYERS, PYTHON, python_path, run

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="QUANTKIT_SGLANG_PYTHON does not name an interpreter that imports sglang"),
]

ANY_GPU = """
from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
CompressedTensorsConfig._check_scheme_supported = lambda self, minimum, error=True: True
"""
# For each folder: the class of Linears and of experts, or the error; as on a GPU that has all that is asked for.
ASK = """
import json, sys
def answer(make):
    try:
        return type(make()).__name__
    except Exception as error:
        return f"{type(error).__name__}: {error}"
for folder in sys.argv[1:]:
    config = CompressedTensorsConfig.from_config(json.load(open(folder + "/config.json"))["quantization_config"])
    found = config.target_scheme_map["Linear"]
    config.get_scheme_dict = lambda *_: found
    parts = found["weights"], found["input_activations"], found["format"]
    linear = answer(lambda: config._get_scheme_from_parts(*parts))
    experts = answer(lambda: config.get_moe_scheme(None, "model.layers.0.mlp.experts"))
    print("ASKED " + json.dumps([folder, linear, experts]))
"""
NAMES = sorted(set(PRESETS) - {"LLM_INT8"})
# Its class is there, and stops when it is filled.
STATIC = ("W8A8_STATIC", "W8A8_STATIC_ASYM")
SIZES = ("FP8_BLOCK",)  # tiny-moe's keys have half a block, which no class says
# Its constructor asks for the GPU itself.
BLACKWELL = ("NVFP4",)


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-moe"])
def test_the_checker_refuses_what_has_no_class(model: str, tmp_path: Path) -> None:
    folders = {}
    for name in NAMES:
        (tmp_path / name).mkdir()
        folders[str(quantize_by(model, f"{{QuantizationModifier: {{scheme: {name}}}}}", tmp_path / name))] = name
    (tmp_path / "ask.py").write_text(ANY_GPU + ASK)
    log = run([PYTHON, str(tmp_path / "ask.py"), *folders], python_path(tmp_path / "plugins"), SGLANG_PLUGINS="none")
    asked = [json.loads(line.removeprefix("ASKED ")) for line in log.splitlines() if line.startswith("ASKED ")]
    assert len(asked) == len(NAMES), log[-3000:]
    for folder, linear, experts in asked:
        name, verdict = folders[folder], check_folder(folder, "sglang")
        of_linears, of_experts = refused_parts(verdict)
        print(f"{model}, {name}: {linear} | {experts} | refused {of_linears}, {of_experts}")
        assert of_linears is ("Error" in linear or name in (*STATIC, *SIZES[model == "tiny-llama" :])), verdict.render()
        if model == "tiny-moe" and name not in BLACKWELL:
            # MXFP4's class for experts is not asked here; its parameters have other names than the checkpoint.
            assert of_experts is ("Error" in experts or name.startswith("MXFP4")), verdict.render()


def test_a_fused_linear_has_room_for_one_static_scale(tmp_path: Path) -> None:
    folder = quantize_by("tiny-llama", "{QuantizationModifier: {scheme: W8A8_STATIC}}", tmp_path)
    (tmp_path / "layers.py").write_text(ANY_GPU + LAYERS)
    save_file({"x": torch.zeros(1, 256)}, tmp_path / "x.safetensors")
    command = [PYTHON, tmp_path / "layers.py", tmp_path / "rendezvous", tmp_path / "x.safetensors", folder]
    log = run([str(part) for part in command], python_path(tmp_path / "plugins"), SGLANG_PLUGINS="none")
    assert "IndexError: index 1 is out of bounds for dimension 0 with size 1" in log, log[-3000:]
    assert "param_data = param_data[shard_id]" in log
    verdict = check_folder(folder, "sglang")
    assert "model.layers.0.self_attn.k_proj.input_scale" in {f.where for f in verdict.findings if f.kind == "refused"}


def test_a_group_without_weights_stops_it(tmp_path: Path) -> None:
    group = "{targets: [LlamaAttention], input_activations: {num_bits: 8, type: float}}"
    folder = quantize_by("tiny-llama", f"{{QuantizationModifier: {{config_groups: {{a: {group}}}}}}}", tmp_path)
    read = 'print("ASKED", answer(lambda: CompressedTensorsConfig.from_config(block)))\n'
    block = 'block = json.load(open(sys.argv[1] + "/config.json"))["quantization_config"]\n'
    (tmp_path / "ask.py").write_text(ANY_GPU + ASK.partition("for folder")[0] + block + read)
    log = run([PYTHON, str(tmp_path / "ask.py"), str(folder)], python_path(tmp_path / "plugins"), SGLANG_PLUGINS="none")
    assert "ASKED ValidationError" in log and "Input should be a valid dictionary" in log, log[-3000:]
    verdict = check_folder(folder, "sglang")
    assert "config_groups.group_0" in {f.where for f in verdict.findings if f.kind == "refused"}
