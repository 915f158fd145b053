"""Transformers and bitsandbytes load what `save_name: bitsandbytes` writes and compute the same; quantkit reads what
they write. QUANTKIT_BITSANDBYTES_PYTHON names an interpreter that has them; without one the tests are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import quantkit
from quantkit.conformance import check_folder
from quantkit.inspection import inspect_folder

from .jobs import EXAMPLES, quantize_by

PYTHON = os.environ.get("QUANTKIT_BITSANDBYTES_PYTHON", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="QUANTKIT_BITSANDBYTES_PYTHON does not name an interpreter with it"),
]
MODEL = EXAMPLES / "models" / "tiny-llama"
RUN = """
import json, sys
import torch
from bitsandbytes.nn import Linear8bitLt
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
folder, tokens, target = sys.argv[1], torch.tensor(json.loads(sys.argv[2])), sys.argv[3]
more = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)} if target else {}
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, **more).eval()
if target:
    model.save_pretrained(target)
with torch.inference_mode():
    logits = model(tokens).logits.float()
linears = {name: module for name, module in model.named_modules() if isinstance(module, Linear8bitLt)}
one = linears["model.layers.1.mlp.up_proj"]
x = torch.randn(6, 256, generator=torch.Generator().manual_seed(4)).half()
x[:, 7] = 0.5
x[2, 7] = 8
with torch.inference_mode():
    y = one(x).float()
print("RESULT " + json.dumps([len(linears), one.state.threshold, logits.flatten().tolist(), y.flatten().tolist()]))
"""
TOKENS = torch.randint(3, 2048, (2, 48), generator=torch.Generator().manual_seed(0))
X = torch.randn(6, 256, generator=torch.Generator().manual_seed(4)).half()
X[:, 7] = 0.5  # bitsandbytes lets what is no outlier in such a column set its row's scale; here it is no row's largest
X[2, 7] = 8


def client(tmp_path: Path, folder: Path, target: str = "") -> tuple[int, float, torch.Tensor, torch.Tensor]:
    """How many Linears it runs in int8, with which threshold, the logits of TOKENS, and what one Linear makes of X."""
    script = tmp_path / "run.py"
    script.write_text(RUN)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [PYTHON, str(script), str(folder), json.dumps(TOKENS.tolist()), target]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, f"Transformers did not load {folder}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    count, threshold, logits, y = json.loads(lines[0].removeprefix("RESULT "))
    return count, threshold, torch.tensor(logits).view(*TOKENS.shape, -1), torch.tensor(y).view(6, -1)


def ours(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of TOKENS, and what the same Linear makes of X."""
    model = quantkit.load(folder, dtype=torch.float32, merge=False)
    with torch.inference_mode():
        return model(TOKENS).logits.float(), model.model.layers[1].mlp.up_proj(X.float())


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().mean() / expected.std())


@pytest.mark.parametrize(("scheme", "threshold"), [("LLM_INT8", 6.0), ("W8A8", 0.0)])
def test_the_client_computes_what_quantkit_does(scheme: str, threshold: float, tmp_path: Path) -> None:
    recipe = f"{{QuantizationModifier: {{scheme: {scheme}, ignore: ['re:.*layers.0.mlp.*']}}}}"
    output = quantize_by("tiny-llama", recipe, tmp_path, "compression.save_name=bitsandbytes")
    assert check_folder(output, "transformers", hardware="cpu").ok
    count, found, logits, y = client(tmp_path, output)
    assert (count, found) == (25, threshold)
    expected, one = ours(output)
    plain = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    with torch.inference_mode():
        quantization = difference(plain(TOKENS).logits, expected)
        rounding = difference(plain.model.layers[1].mlp.up_proj(X.float()), one)
    # Its outputs are fp16's, and a quotient next to one half goes to the other code now and then.
    apart = difference(y, one)
    assert apart < min(1e-3, rounding / 4), (apart, rounding)
    # The model runs in bf16, whose 8 bits are what is between the logits.
    error = difference(logits, expected)
    assert error < 0.015, (error, quantization)
    print(f"{scheme}: a Linear {apart:.2e} of its spread (quantization {rounding:.2e}), logits {error:.2e}", end="")
    print(f" (quantization {quantization:.2e})")


def test_quantkit_reads_what_the_client_writes(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    count, threshold, logits, y = client(tmp_path, MODEL, str(theirs))
    assert (count, threshold) == (28, 6.0)
    assert check_folder(theirs, "transformers", hardware="cpu").ok
    assert len(inspect_folder(theirs, progress=False).linears) == 28
    expected, one_linear = ours(theirs)
    error = difference(expected, logits)
    assert difference(y, one_linear) < 1e-3
    output = quantize_by(
        "tiny-llama", "{QuantizationModifier: {scheme: LLM_INT8}}", tmp_path, "compression.save_name=bitsandbytes"
    )
    one, two = load_file(theirs / "model.safetensors"), load_file(output / "model.safetensors")
    assert one.keys() - {"lm_head.weight"} == two.keys()
    apart = 0
    for name, tensor in two.items():
        assert (one[name].dtype, one[name].shape) == (tensor.dtype, tensor.shape) or tensor.dtype == torch.bfloat16
        if name.endswith(".SCB"):
            torch.testing.assert_close(one[name], tensor, rtol=1e-6, atol=1e-6)
        elif tensor.dtype == torch.int8:
            steps = (one[name].int() - tensor.int()).abs()
            assert int(steps.max()) <= 1
            apart += int(steps.sum())
    codes = sum(t.numel() for t in two.values() if t.dtype == torch.int8)
    assert apart < codes / 200  # its weights and quotients are fp16's
    print(f"logits {error:.2e} apart; {apart} of {codes} codes are others, by one")
    assert error < 0.02
