"""A real client: Transformers with compressed-tensors loads every output, and computes what the codes say.

The oracle is the source model in Transformers with our dequantized weights put in and its Linear inputs rounded by
our own ops: what remains between the two is fp32 summation order, and for activations a rare code that falls on
the other side of a tie.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantkit.checkpoint.reader import Checkpoint
from quantkit.formats.source import WeightSource

from .jobs import EXAMPLES, SCHEMES, quantize

pytest.importorskip("compressed_tensors")
transformers = pytest.importorskip("transformers")

# The weights alone: exact up to summation order. With activations a code may flip where x / scale is within an ulp
# of a tie; one flip changes a logit by a fraction of an activation step.
WEIGHT_ONLY = {"int4", "int8", "W4A16", "W4A16_ASYM", "W8A16"}


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(3, 131).reshape(2, 64)
    with torch.inference_mode():
        return model(input_ids=ids).logits


def oracle(source: Path, output: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with Checkpoint(output) as checkpoint:
        weights = WeightSource(checkpoint)
        assert weights.modules
        for name in weights.modules:
            linear = model.get_submodule(name)
            linear.weight.data = weights.get(f"{name}.weight").clone()
            if name in weights.input_quantizers:
                quantizer = weights.input_quantizers[name]
                linear.register_forward_pre_hook(lambda _, args, q=quantizer: (q(args[0]), *args[1:]))
        return logits(model)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_transformers_computes_what_the_codes_say(scheme: str, tmp_path: Path) -> None:
    source = EXAMPLES / "models" / "tiny-llama"
    output = quantize("tiny-llama", scheme, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    got, expected = logits(model), oracle(source, output)
    spread = expected.std()
    error = (got - expected).abs()
    if scheme in WEIGHT_ONLY:
        assert error.max() < 1e-4 * spread, f"{error.max() / spread:.2e} of the logits' spread"
    else:
        assert error.mean() < 1e-2 * spread, f"{error.mean() / spread:.2e} of the logits' spread"
    plain = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    assert (got - logits(plain)).abs().max() > 1e-3 * spread, "the output is not quantized at all"
