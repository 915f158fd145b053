"""Tiny models whose checkpoints stack experts as the published ones do, and twins that store each expert by itself."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .tiny import make

STACKED = ("qwen3_5_moe_text", "qwen3_vl_moe_text", "llama4_text", "gpt_oss")


def stack(folder: Path, model_type: str, **changes: Any) -> Any:
    """A tiny model in `folder`, stored as its publishers do; gives back Transformers' own."""
    model = make(folder, model_type, **changes)
    if model_type.startswith("qwen"):  # as Qwen stores them: [experts, out, in], or turned over
        tensors = load_file(folder / "model.safetensors")
        kept = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
        inside = {name: p.detach() for name, p in model.named_parameters() if ".experts." in name}
        if model_type == "qwen3_vl_moe_text":
            inside = {name: tensor.transpose(1, 2) for name, tensor in inside.items()}
        inside = {name: tensor.contiguous() for name, tensor in inside.items()}
        save_file({**kept, **inside}, folder / "model.safetensors", metadata={"format": "pt"})
    assert any(tensor.dim() == 3 and ".experts." in name for name, tensor in model.named_parameters())
    return model


def twin(source: Path, folder: Path, model: Any) -> None:
    """The same weights as `model`, stored in `source`, with tensors for each expert, in `folder`."""
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for path, module in model.named_modules():
        if path.endswith(".experts"):
            for name, tensor in by_expert(module).items():
                kept[f"{path}.{name}"] = tensor.detach().clone().contiguous()
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def by_expert(experts: Any) -> dict[str, Tensor]:
    """Each expert's Linears, from what Transformers' module computes with: y = x @ W for Llama 4 and gpt-oss."""
    kind, found = type(experts).__name__, dict[str, Tensor]()
    for index, (both, down) in enumerate(zip(experts.gate_up_proj, experts.down_proj, strict=True)):
        if kind in ("Llama4TextExperts", "GptOssExperts"):
            both, down = both.t(), down.t()
        gate, up = (both[::2], both[1::2]) if kind == "GptOssExperts" else both.chunk(2)
        parts = {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": down}
        if kind == "GptOssExperts":
            bias = experts.gate_up_proj_bias[index]
            parts |= {"gate_proj.bias": bias[::2], "up_proj.bias": bias[1::2]}
            parts |= {"down_proj.bias": experts.down_proj_bias[index]}
        found |= {f"{index}.{name}": tensor for name, tensor in parts.items()}
    return found


def filled(model: Any, weights: dict[str, Tensor]) -> Any:
    """`model`, its experts and Linears filled with plain `weights` that go by the names of each expert's."""
    with torch.no_grad():
        for path, module in model.named_modules():
            if path.endswith(".experts"):
                for name, tensor in by_expert(module).items():
                    tensor.copy_(weights[f"{path}.{name}"])  # a view on the parameter
        for name, parameter in model.named_parameters():
            if ".experts." not in name and name in weights:
                parameter.copy_(weights[name])
    return model
