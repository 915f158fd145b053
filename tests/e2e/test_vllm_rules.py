"""`quantkit check --for vllm` says what vLLM's own classes say: they are asked for the scheme of each config group that
quantkit writes, of Linears and of experts. Skipped without QUANTKIT_VLLM_PYTHON, as test_vllm.py.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from quantkit.config.presets import PRESETS
from quantkit.conformance import check_folder

from .jobs import quantize_by, refused_parts
from .test_vllm import ENVIRONMENT, PYTHON, pytestmark  # noqa: F401

# Which class is taken is all that is asked: what it would look for on a GPU, its kernel, is taken from it. One of the
# capabilities is asked for exactly, by int4 with FP8: it is given.
ASK = """
import importlib, json, pkgutil, sys
from unittest.mock import MagicMock
from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors_moe, schemes
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe import (
    CompressedTensorsMoEMethod)
CompressedTensorsConfig._check_scheme_supported = classmethod(
    lambda cls, minimum, error=True, match_exact=False: not match_exact or minimum == 90)
for package in (compressed_tensors_moe, schemes):
    for info in pkgutil.iter_modules(package.__path__):
        try:
            module = importlib.import_module(package.__name__ + "." + info.name)
        except ImportError:  # AMD's
            continue
        for name in dir(module):
            if name.startswith("select_"):
                backend = getattr(module, "WNA16MoEBackend", MagicMock()).MARLIN
                setattr(module, name, lambda *a, backend=backend, **k: (backend, MagicMock()))
            elif name.startswith(("init_", "check_moe_marlin")):
                setattr(module, name, MagicMock())
        if hasattr(module, "get_current_vllm_config"):
            module.get_current_vllm_config = MagicMock()
def answer(make):
    try:
        return type(make()).__name__
    except Exception as error:
        return f"{type(error).__name__}: {error}"
for folder in sys.argv[1:]:
    config = CompressedTensorsConfig.from_config(json.load(open(folder + "/config.json"))["quantization_config"])
    found = config.target_scheme_map["Linear"]
    config.get_scheme_dict = lambda *_: found
    parts = found["weights"], found["input_activations"], found.get("output_activations"), found["format"], "layer"
    layer = MagicMock()
    layer.moe_config.hidden_dim = layer.moe_config.intermediate_size_per_partition = 256
    linear = answer(lambda: config._get_scheme_from_parts(*parts))
    experts = answer(lambda: CompressedTensorsMoEMethod.get_moe_method(config, layer, "model.layers.0.mlp.experts"))
    print("ASKED " + json.dumps([folder, linear, experts]))
"""
# Classes for experts that stop when they are filled: by their sizes, and for a code a byte on Arm.
SIZES = ("FP8_BLOCK",)  # tiny-moe's keys have half a block, which no class says
STOPS = {"W4AFP8": "CompressedTensorsW4A8Fp8MoEMethod", "W4A8": "CompressedTensorsW4A8Int8MoEMethod"}


def test_the_checker_refuses_what_has_no_class(tmp_path: Path) -> None:
    folders = {}
    for name in sorted(set(PRESETS) - {"LLM_INT8"}):
        (tmp_path / name).mkdir()
        folders[str(quantize_by("tiny-moe", f"{{QuantizationModifier: {{scheme: {name}}}}}", tmp_path / name))] = name
    (tmp_path / "ask.py").write_text(ASK)
    environment = os.environ | ENVIRONMENT
    environment.pop("PYTHONPATH", None)
    command = [PYTHON, str(tmp_path / "ask.py"), *folders]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    asked = [json.loads(line.removeprefix("ASKED ")) for line in lines if line.startswith("ASKED ")]
    assert len(asked) == len(folders), done.stdout[-2000:] + done.stderr[-3000:]
    for folder, linear, experts in asked:
        name, verdict = folders[folder], check_folder(folder, "vllm")
        of_linears, of_experts = refused_parts(verdict)
        print(f"{name}: {linear} | {experts} | refused {of_linears}, {of_experts}")
        assert of_linears is ("Error" in linear or name in SIZES), (linear, verdict.render())
        assert of_experts is ("Error" in experts or STOPS.get(name) == experts), (experts, verdict.render())


@pytest.mark.parametrize(
    ("scheme", "hardware", "words"),
    [
        ("W8A8_STATIC", "cuda", "are no scheme of vllm's experts"),
        ("W4A8", "cpu", "run on Arm CPUs alone"),
        ("W4AFP8", "cuda", "need multiples of 256"),
        ("W4A16_CHANNEL", "cpu", "weight-only experts on cpu need groups"),
    ],
)
def test_experts(scheme: str, hardware: str, words: str, tmp_path: Path) -> None:
    folder = quantize_by("tiny-moe", f"{{QuantizationModifier: {{scheme: {scheme}}}}}", tmp_path)
    verdict = check_folder(folder, "vllm", hardware=hardware)
    assert any(words in f.rule and ".experts." in f.where for f in verdict.findings if f.kind == "refused")
