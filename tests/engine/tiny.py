"""Tiny random models, written to disk by Transformers itself, and sources that read them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from quantkit.formats.fp8_source import open_source
from quantkit.models.text_part import text_model

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 128,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
_ROUTED = {"num_local_experts": 4, "num_experts_per_tok": 2}
_SPLIT = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
}
_CHUNKS = {"num_experts_per_tok": 1, "attention_chunk_size": 16, "pad_token_id": 0, "no_rope_layers": [1, 0, 1]}
_SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
_DEEPSEEK = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "phi3": {"pad_token_id": 0},
    "granite": {"logits_scaling": 2.0, "embedding_multiplier": 3.0},
    "nemotron": {},
    "stablelm": {"use_parallel_residual": True},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "gpt_neox": {},
    "bloom": {},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 96},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {**EXPERTS, "mlp_only_layers": [0], "output_router_logits": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v32": {**_DEEPSEEK, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8},
    "qwen3_5_text": {**_LINEAR, "head_dim": 16},
    "qwen3_5_moe_text": {**_LINEAR, **EXPERTS, "shared_expert_intermediate_size": 32},
    "llama4_text": {
        "num_local_experts": 4,
        "intermediate_size_mlp": 96,
        "head_dim": 16,
        "moe_layers": [0, 2],
        **_CHUNKS,
    },
    "gpt_oss": {**_ROUTED, "head_dim": 16, "sliding_window": 8, "pad_token_id": 0},
    "minimax_m2": {**_ROUTED, "head_dim": 16, "rotary_dim": 8},
    "phimoe": _ROUTED,
    "hunyuan_v1_moe": {**EXPERTS, "moe_topk": 2, "pad_token_id": 0},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_layer_start_index": 1},
    "mimo_v2_flash": {**_SPLIT, "head_dim": 16, "v_head_dim": 16, "sliding_window": 8},
    "hy_v3": {**EXPERTS, "num_shared_experts": 1, "num_local_experts": 4},
}
# Of models that Transformers has with a tower alone.
TEXT_PARTS: dict[str, dict[str, Any]] = {
    "qwen3_vl_moe_text": {**EXPERTS, "num_local_experts": 4, "pad_token_id": 0, "rope_parameters": _SECTIONS},
}


def make(folder: Path, model_type: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model of `model_type`, saved to `folder`; weights are large enough for every layer to matter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **{**SIZES, **{**CONFIGS, **TEXT_PARTS}[model_type], **changes})
    torch.manual_seed(0)
    build: Any = text_model if model_type in TEXT_PARTS else AutoModelForCausalLM.from_config
    model = build(config, dtype=dtype, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    return model


class FileSource:
    """A plain checkpoint; remembers what was released."""

    def __init__(self, folder: Path) -> None:
        stored = load_file(folder / "model.safetensors")
        with open_source(folder) as source:
            self.tensors = {n: stored[n] if n in stored else source.tensor(n).clone() for n in source.tensors}
        self.input_quantizers: dict[str, Callable[[Tensor], Tensor]] = {}
        self.cache_quantizers: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {}
        self.released: list[str] = []

    def names(self) -> set[str]:
        return set(self.tensors)

    def get(self, name: str) -> Tensor:
        return self.tensors[name]

    def release(self, name: str) -> None:
        self.released.append(name)
