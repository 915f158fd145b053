"""Ascend's W8A8: what the loaders of MindIE-LLM, vLLM-Ascend and SGLang on an NPU ask for."""

from __future__ import annotations

from ..checkpoint.folder import DESCRIPTION
from .inventory import FLOATS, Inventory, Stored
from .rules import expect, fused_alike, same_in_fused, sound_scales
from .verdict import Verdict

KINDS = ("W8A8", "W8A8_DYNAMIC", "W8A16")
WIDEST = 65535  # of npu_quant_matmul


def check(found: Inventory, verdict: Verdict) -> None:
    block = found.block or {}
    dtype = str(found.config.get("dtype") or found.config.get("torch_dtype"))
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
        verdict.count(kind)
        _linear(stored, kind, dtype, found, verdict)
    fused_alike(found, verdict, lambda stored: block.get(f"{stored.name}.weight"))
    same_in_fused(found, verdict, ("input_scale", "input_offset"), "the fused layer keeps one of them")
    sound_scales(found, verdict, lambda stored: False)


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
