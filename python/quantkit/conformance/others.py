"""GPTQ, AWQ and quant_method "fp8": what their readers ask of config.json and of each Linear's tensors."""

from __future__ import annotations

import re
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


def _not_kept(stored: Stored, key: str, block: Mapping[str, Any], within: bool, verdict: Verdict) -> None:
    """What is stored quantized is not named as left in full precision; `within`: by a part of its name, too."""
    names = [str(name) for name in block.get(key) or ()]
    if stored.name in names or (within and any(name in stored.name for name in names)):
        verdict.add("refused", stored.name, f"is stored quantized, and {key} names it", f"mend {key}")


def gptq(found: Inventory, verdict: Verdict) -> None:
    block = found.block or {}
    bits, size = _key(block, verdict, "bits"), _key(block, verdict, "group_size")
    _key(block, verdict, "desc_act"), _key(block, verdict, "sym")
    if bits is None or size is None:
        return
    label = block.get("checkpoint_format") or block.get("format") or "gptq"
    if label not in ("gptq", "gptq_v2"):
        verdict.add("refused", "quantization_config.checkpoint_format", f"is {label}; checked are gptq and gptq_v2")
        return
    overrides = _overrides(block, verdict)
    if overrides is None or not all([_gptq_settings(*pair, verdict) for pair in [("", block), *overrides]]):
        return
    settings = {stored.name: _settings_of(stored.name, block, overrides) for stored in found.linears.values()}
    for stored in found.quantized:
        own = settings[stored.name]
        if own is None:
            verdict.add("refused", stored.name, "is stored quantized, and dynamic says that it is not")
            continue
        _gptq_linear(found, stored, own, label == "gptq_v2", verdict)
    fused_alike(
        found,
        verdict,
        lambda stored: _told(settings[stored.name]) if stored.quantized else None,
    )
    sound_scales(found, verdict, lambda stored: True)


def _overrides(block: Mapping[str, Any], verdict: Verdict) -> list[tuple[str, Mapping[str, Any]]] | None:
    """`dynamic`: each pattern, "-:" or "+:" (or nothing) before it, with the settings of what it matches; None if a
    pattern is none.
    """
    found: list[tuple[str, Mapping[str, Any]]] = []
    dynamic = block.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        verdict.add("refused", "quantization_config.dynamic", f"is {dynamic!r}; it maps patterns to settings")
        return None
    for key, own in dynamic.items():
        where = f"quantization_config.dynamic '{key}'"
        if not key.startswith("-:") and not isinstance(own, Mapping):
            verdict.add("refused", where, f"is {own!r}; it has settings for what it matches")
            return None
        try:
            re.compile(key.removeprefix("-:").removeprefix("+:"))
        except re.error as error:
            verdict.add("refused", where, f"is no pattern: {error}")
            return None
        found.append((key, {} if key.startswith("-:") else {**block, **own}))
    return found


def _settings_of(
    name: str, block: Mapping[str, Any], overrides: list[tuple[str, Mapping[str, Any]]]
) -> Mapping[str, Any] | None:
    """Those of the first pattern that fits, else the block's own; None for a Linear that is not to be quantized."""
    for key, own in overrides:
        if re.match(key.removeprefix("-:").removeprefix("+:"), name):
            return None if key.startswith("-:") else own
    return block


def _told(own: Mapping[str, Any] | None) -> tuple[Any, ...] | None:
    return None if own is None else tuple(own.get(key) for key in ("bits", "group_size", "desc_act", "sym"))


def _gptq_settings(pattern: str, own: Mapping[str, Any], verdict: Verdict) -> bool:
    """Whether the client serves these settings; `pattern` under `dynamic`, or "" for all other Linears. False if they
    cannot be checked.
    """
    if pattern.startswith("-:"):
        return True
    where = f"quantization_config.dynamic '{pattern}'." if pattern else "quantization_config."
    bits, size, order, symmetric = (own.get(key) for key in ("bits", "group_size", "desc_act", "sym"))
    if bits not in (4, 8):
        verdict.add("refused", f"{where}bits", f"is {bits}; checked are 4 and 8")
        return False
    if not isinstance(size, int) or size == 0 or size < -1:
        verdict.add("refused", f"{where}group_size", f"is {size!r}; it is -1 or how many inputs share a scale")
        return False
    if verdict.client == "vllm" and not symmetric:
        verdict.add("refused", f"{where}sym", "is false, which vLLM no longer serves", "use compressed-tensors")
    if verdict.client == "vllm" and verdict.hardware == "cpu" and bits != 4:
        verdict.add("refused", f"{where}bits", "is 8, and the cpu kernel takes 4")
    if verdict.client in ("vllm", "sglang") and size not in GROUP_SIZES:
        verdict.add("refused", f"{where}group_size", f"is {size}; served are {GROUP_SIZES}")
    if verdict.client == "vllm" and order and size > 0:
        verdict.add(
            "refused",
            f"{where}desc_act",
            "is true, which vLLM no longer serves",
            "quantize with actorder 'weight', which needs no g_idx",
        )
    return True


def _gptq_linear(found: Inventory, stored: Stored, own: Mapping[str, Any], v2: bool, verdict: Verdict) -> None:
    bits, size = own["bits"], own["group_size"]
    shape = _packed(stored, bits, 0)
    if shape is None:
        verdict.add("wrong", f"{stored.name}.qweight", "is not there, or no matrix", "quantize again")
        return
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
    _zeros(found, stored, bits, bool(own.get("sym")), v2, verdict)
    _order(found, stored, cols, size if size > 0 else cols, bool(own.get("desc_act")), verdict)


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
    if zero is False and verdict.client != "gptqmodel":
        verdict.add("refused", "quantization_config.zero_point", "is false; servers take AWQ with zero points")
    version = str(block.get("version", "gemm")).lower()
    if version != "gemm":
        verdict.add("refused", "quantization_config.version", f"is {version}; served is gemm")
    if bits != 4 or not isinstance(size, int):
        return
    for stored in found.quantized:
        _not_kept(stored, "modules_to_not_convert", block, True, verdict)
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


def bitsandbytes(found: Inventory, verdict: Verdict) -> None:
    block = found.block or {}
    if not (block.get("load_in_8bit") or block.get("_load_in_8bit")):
        verdict.add("refused", "quantization_config.load_in_8bit", "is not true; checked is LLM.int8()")
        return
    threshold = block.get("llm_int8_threshold", 6.0)
    if not isinstance(threshold, int | float) or not threshold >= 0:
        verdict.add("refused", "quantization_config.llm_int8_threshold", f"is {threshold!r}; it is a number from 0 on")
        return
    skipped = block.get("llm_int8_skip_modules")
    for name, stored in found.linears.items():
        # Without a list of its own Transformers leaves out the head.
        kept = stored.head if skipped is None else any(_skips(str(key), name) for key in skipped)
        if stored.expert:
            if stored.quantized:
                verdict.add("refused", name, "is an expert, which Transformers holds as part of one 3-D parameter")
        elif kept and stored.quantized:
            verdict.add("wrong", name, "is stored quantized, and llm_int8_skip_modules takes it out", "mend the list")
        elif not kept and not stored.quantized:
            verdict.add(
                "wrong",
                name,
                "is stored in full precision, and is read as int8 unless llm_int8_skip_modules names it",
                "add the full name",
            )
        weight = shape_of(stored.parts.get("weight"))
        if not stored.quantized:
            continue
        if len(weight) != 2:
            verdict.add("wrong", f"{name}.weight", "is not there, or no matrix", "quantize again")
            continue
        verdict.count(f"LLM.int8() from {threshold:g} on" if threshold else "int8 W8A8 per token")
        wanted: dict[str, tuple[tuple[str, ...], tuple[int, ...] | None]] = {
            "weight": (("I8",), weight),
            "SCB": (("F32",), (weight[0],)),
        }
        expect(verdict, stored, wanted, allowed=("weight_format",))
        if "weight_format" in stored.parts and any(found.value(stored, "weight_format") or b""):
            verdict.add("refused", f"{name}.weight_format", "is not 0; newer readers know rows only")
    head = found.family.heads[0]
    tied = found.family.tied and head not in found.linears
    if tied and skipped is not None and not any(_skips(str(key), head) for key in skipped):
        verdict.add("wrong", head, "is the embedding, and is read as int8 unless llm_int8_skip_modules names it")
    sound_scales(found, verdict, lambda stored: False)


def _skips(key: str, name: str) -> bool:
    """Whether an entry of llm_int8_skip_modules takes `name` out: Transformers' rule."""
    return name.endswith(key) or re.match(rf"(?:{key})(?:(?<=\.)|(?=\.|$))", name) is not None


def fp8(found: Inventory, verdict: Verdict) -> None:
    block = found.block or {}
    scheme = _key(block, verdict, "activation_scheme")
    if scheme not in ("static", "dynamic", None):
        verdict.add("refused", "quantization_config.activation_scheme", f"is '{scheme}'; there are static and dynamic")
    if block.get("weight_scale_semantics") == "inverse":
        verdict.add(
            "refused" if verdict.client != "gptqmodel" else "limited",
            "quantization_config.weight_scale_semantics",
            "is inverse: GPTQModel's own FP8, whose weight_scale_inv divides, and readers multiply",
        )
    size = block.get("weight_block_size")
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
    if (block.get("fmt") or "e4m3") not in ("e4m3", "float8_e4m3fn"):
        verdict.add("wrong", "quantization_config.fmt", f"is {block['fmt']}, and codes are read as e4m3")
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
        key = "ignored_layers" if block.get("ignored_layers") else "modules_to_not_convert"
        _not_kept(stored, key, block, verdict.client == "transformers", verdict)
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
