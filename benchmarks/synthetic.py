"""Random checkpoints of a chosen size, Llama or Qwen3-MoE, written shard by shard, with the embedded tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

EMBEDDED = Path(__file__).resolve().parent.parent / "examples" / "models" / "tiny-llama"


def make_llama(
    folder: Path,
    *,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocab: int = 2048,
    tied: bool = False,
    experts: int = 0,
    active: int = 4,
) -> Path:
    """A bf16 checkpoint with one shard per layer; returns `folder`. Weights are normal with std 0.02, norms ones.
    `tied`: the head is the embedding. With `experts`, each layer has so many, `intermediate` wide, `active` for each
    token.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    head_dim = hidden // heads
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    if experts:
        config |= {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "num_experts": experts,
            "num_experts_per_tok": active,
            "moe_intermediate_size": intermediate,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / name, folder / name)

    def normal(rows: int, cols: int) -> torch.Tensor:
        return (torch.randn(rows, cols, generator=generator) * 0.02).bfloat16()

    weight_map: dict[str, str] = {}
    total, count = 0, layers + 1

    def write(tensors: dict[str, torch.Tensor], index: int) -> None:
        nonlocal total
        name = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        total += sum(t.nbytes for t in tensors.values())

    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes = {
            "self_attn.q_proj": (heads * head_dim, hidden),
            "self_attn.k_proj": (kv_heads * head_dim, hidden),
            "self_attn.v_proj": (kv_heads * head_dim, hidden),
            "self_attn.o_proj": (hidden, heads * head_dim),
        }
        mlp = {
            "gate_proj": (intermediate, hidden),
            "up_proj": (intermediate, hidden),
            "down_proj": (hidden, intermediate),
        }
        if experts:
            shapes["mlp.gate"] = (experts, hidden)
            shapes |= {f"mlp.experts.{i}.{name}": shape for i in range(experts) for name, shape in mlp.items()}
        else:
            shapes |= {f"mlp.{name}": shape for name, shape in mlp.items()}
        tensors = {f"{prefix}{name}.weight": normal(*shape) for name, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        for norm in ("q_norm", "k_norm") if experts else ():
            tensors[f"{prefix}self_attn.{norm}.weight"] = torch.ones(head_dim, dtype=torch.bfloat16)
        write(tensors, layer)
    write(
        {
            "model.embed_tokens.weight": normal(vocab, hidden),
            "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
            **({} if tied else {"lm_head.weight": normal(vocab, hidden)}),
        },
        layers,
    )
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder
