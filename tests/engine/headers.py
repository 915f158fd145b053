"""Checkpoints that are headers only: real files of full size whose data are holes, so that 70B takes no disk."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path


def write_headers(
    folder: Path, config: Mapping[str, object], shards: Sequence[Mapping[str, tuple[str, tuple[int, ...]]]]
) -> Path:
    """`shards`: per file, tensor name -> (dtype, shape) in BF16 or F32. Returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    weight_map: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for tensor, (dtype, shape) in tensors.items():
            begin, size = end, {"BF16": 2, "F32": 4}[dtype]
            for extent in shape:
                size *= extent
            end = begin + size
            header[tensor] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
            weight_map[tensor] = name
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / name, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
        total += end
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def llama(
    folder: Path, *, hidden: int, intermediate: int, layers: int, kv: int, vocab: int, tied: bool = False
) -> Path:
    """A Llama-shaped set of headers, one shard a layer."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "tie_word_embeddings": tied,
    }
    shards: list[dict[str, tuple[str, tuple[int, ...]]]] = [{"model.embed_tokens.weight": ("BF16", (vocab, hidden))}]
    if not tied:
        shards[0]["lm_head.weight"] = ("BF16", (vocab, hidden))
    shards[0]["model.norm.weight"] = ("BF16", (hidden,))
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shards.append(
            {
                f"{prefix}.self_attn.q_proj.weight": ("BF16", (hidden, hidden)),
                f"{prefix}.self_attn.k_proj.weight": ("BF16", (kv, hidden)),
                f"{prefix}.self_attn.v_proj.weight": ("BF16", (kv, hidden)),
                f"{prefix}.self_attn.o_proj.weight": ("BF16", (hidden, hidden)),
                f"{prefix}.mlp.gate_proj.weight": ("BF16", (intermediate, hidden)),
                f"{prefix}.mlp.up_proj.weight": ("BF16", (intermediate, hidden)),
                f"{prefix}.mlp.down_proj.weight": ("BF16", (hidden, intermediate)),
                f"{prefix}.input_layernorm.weight": ("BF16", (hidden,)),
                f"{prefix}.post_attention_layernorm.weight": ("BF16", (hidden,)),
            }
        )
    return write_headers(folder, config, shards)
