"""MLPs and attentions on one-pass ops: which classes, and that they compute the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from quantkit.models.fused_block import fuse_blocks, fused_blocks, unfuse

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
# What a layer's MLP and attention become: both on ops, one of them, or none.
CLASSES = {
    "Llama": (True, True),
    "Qwen2": (True, True),
    "Qwen3": (True, True),
    "Mistral": (True, True),
    "Gemma2": (False, True),
    "Phi3": (False, True),
    "GPTNeoX": (False, False),
    "GPT2": (False, False),
}


def model_of(name: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    small = dict(SMALL)
    if name == "GPT2":
        small = {"vocab_size": 64, "n_embd": 64, "n_layer": 1, "n_head": 4}
    if name in ("GPTNeoX", "Phi3", "Gemma2", "Qwen3"):
        small["pad_token_id"] = 0
    config = getattr(transformers, f"{name}Config")(**small)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    return model


@pytest.mark.parametrize("name", CLASSES)
def test_same_numbers(name: str) -> None:
    model = model_of(name)
    ids = torch.randint(64, (2, 24))
    with torch.no_grad():
        wanted = model(ids).logits.float()
        changed = fuse_blocks(model)
        found = model(ids).logits.float()
        kinds = {type(module).__name__ for module in changed}
        assert (any("MLP" in k for k in kinds), any("Attention" in k for k in kinds)) == CLASSES[name]
        # Each step of bf16 that is left out moves a number by 2^-9 of it; there are some twenty in a layer.
        assert (found - wanted).abs().max() <= 20 * 2.0**-9 * wanted.abs().max()
        assert torch.equal(found, wanted) == (not changed)
        unfuse(changed)
        assert torch.equal(model(ids).logits.float(), wanted)


def test_fp32_stays_as_it_is_and_so_does_a_copy() -> None:
    model = model_of("Llama", torch.float32)
    ids = torch.randint(64, (1, 9))
    with torch.no_grad():
        wanted = model(ids).logits
        with fused_blocks(model):
            assert torch.equal(model(ids).logits, wanted)
        assert not any("forward" in module.__dict__ for module in model.modules())
        fuse_blocks(model)
        other = copy.deepcopy(model)
        for parameter in other.parameters():
            parameter.zero_()
        assert torch.equal(model(ids).logits, wanted) and not other(ids).logits.any()


def test_another_gate_is_left_alone() -> None:
    model = model_of("Llama")
    layer: Any = model.get_submodule("model.layers.0")

    class Clipped(type(layer.mlp)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=0.1) * self.up_proj(x))
            return out

    layer.mlp.__class__ = Clipped
    assert [type(module).__name__ for module in fuse_blocks(model)] == ["LlamaAttention"]
