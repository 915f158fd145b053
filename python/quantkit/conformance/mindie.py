"""Ascend's W8A8: what the loaders of MindIE-LLM, vLLM-Ascend and SGLang on an NPU ask for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..attentions import attention_modules, kv_heads
from ..checkpoint.folder import DESCRIPTION
from ..formats.mindie_cache import CACHE, KEYS, KIND
from .inventory import FLOATS, Inventory, Stored
from .rules import expect, fused_alike, same_in_fused, sound_scales
from .verdict import Verdict

KINDS = ("W8A8", "W8A8_DYNAMIC", "W8A16")
WIDEST = 65535  # of npu_quant_matmul
NZ = 32  # channels of a head that lie together in an int8 cache


def check(found: Inventory, verdict: Verdict) -> None:
    block = found.block or {}
    dtype = str(found.config.get("dtype") or found.config.get("torch_dtype"))
    named, kind = found.config.get("quantize"), str(block.get("model_quant_type")).lower()
    if named is not None and named != kind:
        verdict.add("wrong", "quantize", f"is '{named}' in config.json, and {DESCRIPTION} is of '{kind}'")
    for name in found.checkpoint.tensors:
        if name not in block:
            verdict.add("refused", name, f"is not in {DESCRIPTION}, where loaders look each tensor up")
    head = f"{found.family.heads[0]}.weight"
    if head not in block:
        verdict.add("refused", head, f"is not in {DESCRIPTION}, where loaders look it up also if it is tied")
    for stored in found.quantized:
        kind = str(block.get(f"{stored.name}.weight"))
        if kind not in KINDS:
            verdict.add(
                "refused", stored.name, f"is stored quantized and described as '{kind}'; checked are {', '.join(KINDS)}"
            )
            continue
        for info in stored.parts.values():
            own = str(block.get(info.name))
            if own != kind and not info.name.endswith(".bias"):
                verdict.add("wrong", info.name, f"is described as '{own}', and its weight as '{kind}'")
        verdict.count(kind)
        _linear(stored, kind, dtype, found, verdict)
    for name, stored in found.linears.items():
        kind = str(block.get(f"{name}.weight"))
        if kind in KINDS and not stored.quantized:
            verdict.add("wrong", name, f"is described as {kind}, and has no scales of it", "quantize again")
    _caches(found, block, dtype, verdict)
    fused_alike(found, verdict, lambda stored: str(block.get(f"{stored.name}.weight")))
    same_in_fused(found, verdict, ("input_scale", "input_offset"), "the fused layer keeps one of them")
    sound_scales(found, verdict, lambda stored: False)


def _caches(found: Inventory, block: Mapping[str, Any], dtype: str, verdict: Verdict) -> None:
    """A KV cache in int8: of every attention, told in the description, with scales as vLLM-Ascend uses them."""
    import torch

    kinds = {str(block[key]) for key in KEYS if block.get(key)}
    tensors = found.checkpoint.tensors
    if not kinds:
        for name in tensors:
            if name.endswith(CACHE):
                verdict.add(
                    "wrong", name, f"scales a KV cache, and {DESCRIPTION} has no {KEYS[0]}; it is not looked at"
                )
        return
    if kinds != {KIND}:
        verdict.add("refused", KEYS[0], f"is {', '.join(sorted(kinds))}; served is {KIND}, int8 per channel")
        return
    for key in KEYS:
        if not block.get(key):
            verdict.add("limited", key, "is not there; MindIE looks for kv_quant_type, vLLM-Ascend for kv_cache_type")
    if dtype != "float16":
        verdict.add("limited", "config.json", f"dtype is {dtype}; MindIE documents its int8 KV cache for float16 only")
    if not any(block.get(f"{stored.name}.weight") == "W8A8" for stored in found.quantized):
        verdict.add("limited", KEYS[0], "MindIE documents it beside W8A8, of which there is no Linear")
    heads = kv_heads(found.config) or 1
    for attention in attention_modules(found.family, tensors):
        verdict.count(f"KV cache {KIND}")
        for name in (f"{attention}.{part}" for part in CACHE):
            info, maker = tensors.get(name), tensors.get(f"{name.rpartition('.')[0]}.weight")
            if info is None:
                verdict.add("wrong", name, "is not there, and the cache is scaled by 1", "quantize again")
                continue
            channels = 0 if maker is None else maker.shape[0]
            if info.dtype not in FLOATS:
                verdict.add("refused", name, f"is {info.dtype}; read is {' or '.join(FLOATS)}")
            if tuple(info.shape) not in ((channels,), (channels, 1)):
                verdict.add("refused", name, f"is {list(info.shape)}; its Linear makes {channels} channels")
            elif (channels // heads) % NZ:
                verdict.add("limited", name, f"heads of {channels // heads}: vLLM-Ascend's cache is laid out by {NZ}")
            value = found.checkpoint.tensor(name).float()
            if name.endswith("offset") and bool((value != 0).any()):
                verdict.add("wrong", name, "is not zero, and vLLM-Ascend reads its cache by the scales alone")
            elif name.endswith("scale") and not bool((torch.isfinite(value) & (value > 0)).all()):
                verdict.add("wrong", name, "has values that are not finite and positive", "quantize again")


def _linear(stored: Stored, kind: str, dtype: str, found: Inventory, verdict: Verdict) -> None:
    import torch

    weight = stored.parts.get("weight")
    if weight is None or len(weight.shape) != 2:
        verdict.add("wrong", f"{stored.name}.weight", "is not there, or no matrix", "quantize again")
        return
    rows, cols = weight.shape
    if max(rows, cols) > WIDEST:
        verdict.add("refused", stored.name, f"{rows} x {cols}: the NPU's kernel takes at most {WIDEST}")
    scales = {"weight_scale": (FLOATS, (rows, 1)), "weight_offset": (FLOATS, (rows, 1))}
    if kind != "W8A8":
        expect(verdict, stored, {"weight": (("I8",), (rows, cols)), **scales})
        return
    if stored.expert:
        verdict.add("refused", stored.name, "is an expert with static inputs; experts are served as W8A8_DYNAMIC")
    if dtype not in ("bfloat16", "float16"):
        verdict.add("refused", "config.json", f"dtype is {dtype}; static W8A8 is for bfloat16 and float16")
        return
    expect(
        verdict,
        stored,
        {
            "weight": (("I8",), (rows, cols)),
            "input_scale": (FLOATS, (1,)),
            "input_offset": ((*FLOATS, "I8"), (1,)),
            "quant_bias": (("I32",), (rows,)),
            "deq_scale": (("F32",) if dtype == "bfloat16" else ("I64",), (rows,)),
        },
        allowed=tuple(scales),
    )
    if "input_offset" in stored.parts:
        offset = float(found.checkpoint.tensor(f"{stored.name}.input_offset").float().reshape(-1)[0])
        if offset != round(offset) or not -128 <= offset <= 127:
            verdict.add("wrong", f"{stored.name}.input_offset", f"is {offset}, and it is read as int8")
    if "deq_scale" in stored.parts:
        from ..formats.mindie import dequantizing_scale

        value = dequantizing_scale(found.checkpoint.tensor(f"{stored.name}.deq_scale"))
        if not bool((torch.isfinite(value) & (value > 0)).all()):
            verdict.add(
                "wrong", f"{stored.name}.deq_scale", "has values that are not finite and positive", "quantize again"
            )
