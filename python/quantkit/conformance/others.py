"""GPTQ, AWQ and quant_method "fp8": what their readers ask of config.json and of each Linear's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .inventory import Inventory, Stored
from .rules import divides, expect, fused_alike, shape_of, sound_scales, whole_blocks
from .verdict import Verdict

GROUP_SIZES = (-1, 32, 64, 128)


def _key(block: Mapping[str, Any], verdict: Verdict, *names: str) -> Any:
    """The first of `names` that is there; without one the reader stops."""
    for name in names:
        if block.get(name) is not None:
            return block[name]
    verdict.add("refused", f"quantization_config.{names[0]}", "is not there, and readers ask for it")
    return None


def _packed(stored: Stored, bits: int, along: int) -> tuple[int, int] | None:
    """[inputs, outputs] of a `qweight` that packs dimension `along`."""
    shape = shape_of(stored.parts.get("qweight"))
    if len(shape) != 2:
        return None
    factor = 32 // bits
    return (shape[0] * factor, shape[1]) if along == 0 else (shape[0], shape[1] * factor)


def gptq(found: Inventory, verdict: Verdict) -> None:
    block = found.block or {}
    bits, size = _key(block, verdict, "bits"), _key(block, verdict, "group_size")
    order, symmetric = _key(block, verdict, "desc_act"), _key(block, verdict, "sym")
    if bits not in (4, 8) or not isinstance(size, int):
        verdict.add("refused", "quantization_config.bits", f"is {bits}; checked are 4 and 8")
        return
    if verdict.client == "vllm" and not symmetric:
        verdict.add(
            "refused", "quantization_config.sym", "is false, which vLLM no longer serves", "use compressed-tensors"
        )
    if verdict.client == "vllm" and verdict.hardware == "cpu" and bits != 4:
        verdict.add("refused", "quantization_config.bits", "is 8, and the cpu kernel takes 4")
    if verdict.client in ("vllm", "sglang") and size not in GROUP_SIZES:
        verdict.add("refused", "quantization_config.group_size", f"is {size}; served are {GROUP_SIZES}")
    if verdict.client == "vllm" and order and size > 0:
        verdict.add(
            "refused",
            "quantization_config.desc_act",
            "is true, which vLLM no longer serves",
            "quantize with actorder 'weight', which needs no g_idx",
        )
    v2 = (block.get("checkpoint_format") or block.get("format")) == "gptq_v2"
    for stored in found.quantized:
        shape = _packed(stored, bits, 0)
        if shape is None:
            verdict.add("wrong", f"{stored.name}.qweight", "is not there, or no matrix", "quantize again")
            continue
        cols, rows = shape
        groups = 1 if size == -1 else -(-cols // size)
        expect(
            verdict,
            stored,
            {
                "qweight": (("I32",), (cols * bits // 32, rows)),
                "qzeros": (("I32",), (groups, rows * bits // 32)),
                "scales": (("F16", "BF16"), (groups, rows)),
            },
            allowed=("g_idx",),
        )
        verdict.count(f"GPTQ {bits} bit")
        divides(verdict, stored, rows, cols, row_unit=32 // bits, col_unit=size if size > 0 else 1, what=" (groups)")
        _zeros(found, stored, bits, bool(symmetric), v2, verdict)
        _order(found, stored, cols, size if size > 0 else cols, bool(order), verdict)
    fused_alike(found, verdict, lambda stored: stored.quantized)
    sound_scales(found, verdict, lambda stored: True)


def _zeros(found: Inventory, stored: Stored, bits: int, symmetric: bool, v2: bool, verdict: Verdict) -> None:
    """Of symmetric weights every zero point is the middle code: one less in version 1, itself in version 2."""
    info = stored.parts.get("qzeros")
    if info is None or info.dtype != "I32" or not symmetric:
        return
    import torch

    middle = (1 << (bits - 1)) - (0 if v2 else 1)
    word = sum(middle << (bits * i) for i in range(32 // bits))
    word -= (word >> 31) << 32
    zeros = found.checkpoint.tensor(info.name)
    if not bool(torch.eq(zeros, word).all()):
        label = "gptq_v2" if v2 else "gptq"
        verdict.add(
            "wrong",
            info.name,
            f"sym is true and checkpoint_format {label}, so every word is {word & 0xFFFFFFFF:#x}, and it is not",
            "the label may be that of the other version",
        )


def _order(found: Inventory, stored: Stored, cols: int, size: int, order: bool, verdict: Verdict) -> None:
    info = stored.parts.get("g_idx")
    if info is None:
        if order:
            verdict.add("wrong", f"{stored.name}.g_idx", "is not there, and desc_act is true")
        else:
            verdict.add("limited", f"{stored.name}.g_idx", "is not there; some readers (llama.cpp) ask for it")
        return
    if tuple(info.shape) != (cols,) or info.dtype != "I32":
        verdict.add("refused", info.name, f"is {info.dtype} {list(info.shape)}; read is I32 [{cols}]")
        return
    counts = found.checkpoint.tensor(info.name).long()
    if int(counts.min()) < 0 or not bool((counts.bincount(minlength=1)[: cols // size] == size).all()):
        verdict.add("wrong", info.name, f"does not put {size} of {cols} columns into each group")


def awq(found: Inventory, verdict: Verdict) -> None:
    block = found.block or {}
    bits = _key(block, verdict, "bits", "w_bit")
    size = _key(block, verdict, "group_size", "q_group_size")
    zero = _key(block, verdict, "zero_point")
    if bits != 4:
        verdict.add("refused", "quantization_config.bits", f"is {bits}; AWQ kernels take 4")
    if zero is False:
        verdict.add("refused", "quantization_config.zero_point", "is false; servers take AWQ with zero points")
    version = str(block.get("version", "gemm")).lower()
    if version != "gemm":
        verdict.add("refused", "quantization_config.version", f"is {version}; served is gemm")
    if bits != 4 or not isinstance(size, int):
        return
    for stored in found.quantized:
        shape = _packed(stored, 4, 1)
        if shape is None:
            verdict.add("wrong", f"{stored.name}.qweight", "is not there, or no matrix", "quantize again")
            continue
        cols, rows = shape
        groups = 1 if size == -1 else -(-cols // size)
        expect(
            verdict,
            stored,
            {
                "qweight": (("I32",), (cols, rows // 8)),
                "qzeros": (("I32",), (groups, rows // 8)),
                "scales": (("F16", "BF16"), (groups, rows)),
            },
        )
        verdict.count("AWQ 4 bit")
        divides(verdict, stored, rows, cols, row_unit=8, col_unit=size if size > 0 else 1, what=" (groups)")
    fused_alike(found, verdict, lambda stored: stored.quantized)
    sound_scales(found, verdict, lambda stored: True)


def fp8(found: Inventory, verdict: Verdict) -> None:
    block = found.block or {}
    scheme = _key(block, verdict, "activation_scheme")
    if scheme not in ("static", "dynamic", None):
        verdict.add("refused", "quantization_config.activation_scheme", f"is '{scheme}'; there are static and dynamic")
    size = block.get("weight_block_size")
    if size is not None and not (isinstance(size, list) and len(size) == 2):
        verdict.add("refused", "quantization_config.weight_block_size", f"is {size}; read is [rows, columns]")
        return
    if size and scheme == "static":
        verdict.add("refused", "quantization_config.activation_scheme", "is static, which does not go with blocks")
    if verdict.client == "transformers" and not size:
        verdict.add(
            "wrong",
            "quantization_config",
            "per-tensor scales under this method have other names in Transformers, which then does not apply them",
            "write compressed-tensors for Transformers",
        )
    if verdict.client == "vllm" and verdict.hardware == "cpu":
        verdict.add("refused", "quantization_config.quant_method", "fp8 needs AMX on a cpu, or a GPU")
    kept = [str(name) for name in block.get("ignored_layers") or block.get("modules_to_not_convert") or ()]
    for name, stored in found.linears.items():
        if not stored.quantized:
            full = name in kept or any(k in name for k in kept) if verdict.client == "transformers" else name in kept
            if not full and not stored.head:
                verdict.add(
                    "wrong",
                    name,
                    "is stored in full precision, and ignored_layers does not have its full name",
                    "add the full name",
                )
            continue
        weight = shape_of(stored.parts.get("weight"))
        if len(weight) != 2:
            verdict.add("wrong", f"{name}.weight", "is not there, or no matrix", "quantize again")
            continue
        rows, cols = weight
        wanted: dict[str, tuple[tuple[str, ...], tuple[int, ...] | None]] = {"weight": (("F8_E4M3",), weight)}
        if size:
            grid = (-(-rows // size[0]), -(-cols // size[1]))
            wanted["weight_scale_inv"] = (("F32", "BF16"), grid)
            if verdict.client == "transformers" and (rows % size[0] or cols % size[1]):
                verdict.add(
                    "wrong", name, f"{rows} x {cols} is no multiple of the block, which is inferred from its scales"
                )
            elif verdict.client != "transformers":
                whole_blocks(found, verdict, stored, (rows, cols), size)
        else:
            wanted["weight_scale"] = (("F32", "BF16"), None)
            if scheme == "static":
                wanted["input_scale"] = (("F32", "BF16"), None)
        verdict.count("FP8 per block" if size else "FP8 per tensor")
        expect(verdict, stored, wanted)
    fused_alike(found, verdict, lambda stored: stored.quantized)
    sound_scales(found, verdict, lambda stored: False)
