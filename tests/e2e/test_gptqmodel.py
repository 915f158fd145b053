"""GPTQModel loads what `save_name: gptq | awq` writes and computes what the codes say. It needs its own environment:
QUANTKIT_GPTQMODEL_PYTHON names an interpreter that has it; without one the tests are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import transformers

from quantkit.checkpoint.reader import Checkpoint
from quantkit.conformance import check_folder
from quantkit.formats.source import WeightSource

from .jobs import EXAMPLES, quantize_by

PYTHON = os.environ.get("QUANTKIT_GPTQMODEL_PYTHON", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="QUANTKIT_GPTQMODEL_PYTHON does not name an interpreter with GPTQModel"),
]

RUN = """
import json, sys
import torch
from gptqmodel import GPTQModel
model = GPTQModel.load(sys.argv[1], device="cpu").model
tokens = torch.tensor(json.loads(sys.argv[2]))
with torch.no_grad():
    print("LOGITS " + json.dumps(model(tokens).logits.float().flatten().tolist()))
"""
JOBS = {
    "gptq": ("gptq", "{GPTQModifier: {scheme: W4A16}}"),
    "gptq in order": ("gptq", "{GPTQModifier: {scheme: W4A16, actorder: group}}"),
    "gptq asymmetric": ("gptq", "{QuantizationModifier: {scheme: W4A16_ASYM}}"),
    "gptq int8": ("gptq", "{QuantizationModifier: {scheme: W8A16}}"),
    "gptq, some layers": ("gptq", "{QuantizationModifier: {scheme: W4A16, ignore: ['re:.*layers.2.*']}}"),
    "awq": ("awq", "{QuantizationModifier: {scheme: W4A16_ASYM}}"),
    "awq symmetric": ("awq", "{QuantizationModifier: {scheme: W4A16}}"),
}


@pytest.mark.parametrize("job", JOBS)
def test_gptqmodel_computes_what_the_codes_say(job: str, tmp_path: Path) -> None:
    name, modifiers = JOBS[job]
    output = quantize_by("tiny-llama", modifiers, tmp_path, f"compression.save_name={name}")
    assert check_folder(output, "gptqmodel", hardware="cpu").ok
    model = transformers.AutoModelForCausalLM.from_pretrained(EXAMPLES / "models" / "tiny-llama", dtype=torch.float32)
    tokens = torch.randint(3, 2048, (2, 48), generator=torch.Generator().manual_seed(0))
    plain = model(tokens).logits.detach()
    with Checkpoint(output) as checkpoint:
        weights = WeightSource(checkpoint)
        for module in weights.modules:
            model.get_submodule(module).weight.data = weights.get(f"{module}.weight").clone()
    expected = model(tokens).logits.detach()
    script = tmp_path / "run.py"
    script.write_text(RUN)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [PYTHON, str(script), str(output), json.dumps(tokens.tolist())], env=environment, capture_output=True, text=True
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("LOGITS ")]
    assert lines, f"GPTQModel did not load {output}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    got = torch.tensor(json.loads(lines[0].removeprefix("LOGITS "))).view_as(expected)
    # It computes in bf16, whose 8 bits are what is between the two; rounding to 4 bits is an order of magnitude more.
    error, quantization = ((x - expected).abs().mean() / expected.std() for x in (got, plain))
    assert error < 0.008, f"{error:.2e} of the logits' spread"
    if "int8" not in job:
        assert quantization > 5 * error
    print(f"{job}: {error:.2e}, quantization itself {quantization:.2e}")
