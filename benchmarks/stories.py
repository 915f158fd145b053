"""stories260K, a trained llama2.c model of 260 thousand parameters, as a Transformers checkpoint, and text of its own.

Its widths (64, 172) divide by no usual group, so schemes per channel are what it is measured with.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from pathlib import Path

import torch
from safetensors.torch import save_file
from synthetic import EMBEDDED
from torch import Tensor


def convert(binary: Path, folder: Path) -> Path:
    """Write the checkpoint of llama2.c's `binary` to `folder`: fp32, tied embeddings."""
    raw = binary.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, length = struct.unpack("7i", raw[:28])
    numbers = torch.frombuffer(bytearray(raw[28:]), dtype=torch.float32)
    head, at = dim // heads, 0

    def take(*shape: int) -> Tensor:
        nonlocal at
        at += math.prod(shape)
        return numbers[at - math.prod(shape) : at].view(*shape)

    def halves(weight: Tensor, count: int) -> Tensor:
        """Rotary pairs side by side, as llama2.c has them, to pairs half a head apart."""
        return weight.view(count, head // 2, 2, dim).transpose(1, 2).reshape(-1, dim)

    # In the order of the file.
    embedding, attention_norm = take(vocab, dim), take(layers, dim)
    q, k, v = take(layers, dim, dim), take(layers, kv_heads * head, dim), take(layers, kv_heads * head, dim)
    o, mlp_norm = take(layers, dim, dim), take(layers, dim)
    gate, down, up = take(layers, hidden, dim), take(layers, dim, hidden), take(layers, hidden, dim)
    tensors = {"model.embed_tokens.weight": embedding, "model.norm.weight": take(dim)}
    for i in range(layers):
        parts = {
            "input_layernorm": attention_norm[i],
            "post_attention_layernorm": mlp_norm[i],
            "self_attn.q_proj": halves(q[i], heads),
            "self_attn.k_proj": halves(k[i], kv_heads),
            "self_attn.v_proj": v[i],
            "self_attn.o_proj": o[i],
            "mlp.gate_proj": gate[i],
            "mlp.up_proj": up[i],
            "mlp.down_proj": down[i],
        }
        tensors |= {f"model.layers.{i}.{name}.weight": tensor for name, tensor in parts.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": dim,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
        "vocab_size": vocab,
        "max_position_embeddings": length,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    # Another model's: text comes as ids, but llm-compressor does not start without a tokenizer.
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / name, folder / name)
    return folder


def told(folder: Path, rows: int, seed: int, length: int = 256) -> list[list[int]]:
    """Stories that the model tells: `rows` of `length` token ids, sampled at temperature 1."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(seed)
    begin = torch.ones(rows, 1, dtype=torch.int64)
    with torch.inference_mode():
        ids = model.generate(
            begin,
            attention_mask=torch.ones_like(begin),
            do_sample=True,
            top_k=0,
            max_length=length,
            min_length=length,
            pad_token_id=0,
        )
    found: list[list[int]] = ids.tolist()
    return found
