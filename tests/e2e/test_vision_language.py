"""Vision-language models: their text part is quantized, Transformers loads the whole, and the tower is as it was."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.conformance import check_folder
from quantkit.modifiers import GPTQModifier, SmoothQuantModifier

ROOT = Path(__file__).resolve().parents[2]
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 2048,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 4, 4]},
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "num_attention_heads": 2, "out_hidden_size": 128}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
DEPTH = {"depth": 1, "num_hidden_layers": 1, "fullatt_block_indexes": [0], "deepstack_visual_indexes": [0]}


def make(folder: Path, model_type: str) -> Any:
    """A random model with its tower, saved to `folder` with a tokenizer."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    plain = AutoConfig.for_model(model_type)
    raw = plain.to_dict()
    tower = {k: v for k, v in {**SMALL, **DEPTH}.items() if k in raw["vision_config"]}
    text = {k: v for k, v in {**TEXT, **EXPERTS}.items() if k in raw["text_config"] or k == "rope_parameters"}
    raw["text_config"].pop("layer_types", None)  # of as many layers as the default has
    if model_type == "llama4":
        text |= {"num_experts_per_tok": 1, "moe_layers": [0], "no_rope_layers": [1, 0], "intermediate_size_mlp": 256}
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
        tower |= {"image_size": 28, "vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64}
        tower |= {"intermediate_size": 128}
    raw["text_config"].update(text)
    raw["vision_config"].update(tower)
    raw["tie_word_embeddings"] = False
    config = type(plain).from_dict(raw)
    torch.manual_seed(0)
    model: Any = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    if model_type == "qwen3_vl_moe":  # stored [experts, in, out], as its publishers do
        tensors = load_file(folder / "model.safetensors")
        turned = {n: t.transpose(1, 2).contiguous() if ".experts." in n else t for n, t in tensors.items()}
        save_file(turned, folder / "model.safetensors", metadata={"format": "pt"})
    for file in (ROOT / "examples" / "models" / "tiny-llama").glob("token*"):
        shutil.copy(file, folder)
    return model


@pytest.mark.parametrize(
    "model_type", ["qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "llama4", "gemma3", "mistral3", "glm4v"]
)
def test_the_text_part_is_quantized_and_transformers_loads_the_whole(model_type: str, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    source, output = tmp_path / "source", tmp_path / "output"
    model = make(source, model_type)
    quantkit.oneshot(
        str(source),
        recipe=[
            SmoothQuantModifier(smoothing_strength=0.5),
            GPTQModifier(targets="Linear", scheme="W8A16", ignore=["lm_head"]),
        ],
        dataset=str(ROOT / "examples" / "data" / "calibration.jsonl"),
        max_seq_length=64,
        num_calibration_samples=8,
        output_dir=str(output),
    )
    before, after = load_file(source / "model.safetensors"), load_file(output / "model.safetensors")
    towers = [name for name in before if ".layers." not in name or "vision" in name or "visual" in name]
    assert any("vis" in name for name in towers)
    assert all(torch.equal(before[name], after[name]) for name in towers)
    stacked = {"gate_up_proj": 2 * 4, "down_proj": 4}  # Linears of four experts
    assert sum(name.endswith(".weight_packed") for name in after) == sum(
        stacked.get(name.rpartition(".")[2], name.endswith("_proj.weight") and "vis" not in name) for name in before
    )
    ids = torch.arange(1, 65).reshape(2, 32)
    with torch.no_grad():
        wanted = model(input_ids=ids).logits.float()
        ours = quantkit.load(output)(ids).logits.float()
        verdict = check_folder(output, "transformers")
        if model_type == "qwen3_vl_moe":  # routes change, too
            assert not verdict.ok and "is left out" in verdict.findings[0].rule
            assert check_folder(output, "vllm").ok and check_folder(output, "sglang").ok
            assert float((ours - wanted).norm() / wanted.norm()) < 0.2
            return
        assert verdict.ok
        client: Any = AutoModelForImageTextToText.from_pretrained(output, dtype=torch.bfloat16)
        theirs = client(input_ids=ids).logits.float()
    # 8-bit weights cost some percent of so small a model's logits, bf16's own rounding about as much.
    apart = [float((logits - wanted).norm() / wanted.norm()) for logits in (theirs, ours)]
    assert max(apart) < 0.12, apart
    assert float((ours - theirs).norm() / wanted.norm()) < 0.08
