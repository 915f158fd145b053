"""Whether a quantized checkpoint is what its config says: every reader asks before it reads a weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..attentions import kv_heads, query_heads
from ..config.schemes import QuantizationArgs, QuantizationScheme
from ..errors import CheckpointError
from .attention import LEAST, MOST, QUERY, calibrated

if TYPE_CHECKING:
    from .source import WeightSource

# Integers and 8-bit floats: what no parameter of a plain model has.
CODES = ("I8", "U8", "I32", "F8_E4M3", "F8_E5M2", "F4")
FLOATS = ("F32", "F16", "BF16")
INPUTS = ("input_scale", "input_global_scale")
# Stored by writers in whatever float dtype the model had; read as fp32.
SCALES = (
    *("weight_scale", "weight_scale_inv", "scales", "SCB", "input_scale", "input_offset", "weight_global_scale"),
    *("input_global_scale", "k_scale", "v_scale", "q_scale"),
)


def describe(args: QuantizationArgs) -> str:
    """`args` in a few words: int8 per token, asymmetric."""
    kind = {"e8m0": f"mxfp{args.num_bits}", "nvfp4": "nvfp4"}.get(
        args.scales, "fp8" if args.type == "float" else f"int{args.num_bits}"
    )
    size = args.group_size or args.block_structure
    words = f"{kind} per {args.strategy}" + (f" of {size}" if size else "")
    words += f", from {args.outlier_threshold:g} on in 16 bit" if args.outlier_threshold is not None else ""
    return words + ("" if args.symmetric else ", asymmetric") + (", at run time" if args.dynamic else "")


def describe_scheme(scheme: QuantizationScheme) -> str:
    inputs = scheme.input_activations
    return f"weights {describe(scheme.weights)} with activations {'in 16 bit' if inputs is None else describe(inputs)}"


def check_stored(source: WeightSource) -> None:
    """CheckpointError unless every quantized module has the tensors that its scheme says: all of them, no others, with
    their dtypes and shapes. Headers alone are read, and the scales of inputs and of KV caches.
    """
    if source.format is None:
        return
    for problem in _problems(source):
        raise CheckpointError(f"{source.checkpoint.folder}: {problem}")


def _problems(source: WeightSource) -> Iterator[str]:
    tensors, known = source.checkpoint.tensors, source.names()
    parts = source.format.PARTS if source.format is not None else ()
    # What tells that a module is quantized, and so has to be there.
    anchor = next((part for part in ("qweight", "SCB") if part in parts), "weight_scale")
    for name, info in tensors.items():
        module, _, part = name.rpartition(".")
        if module in source.modules:
            continue
        if part in parts and part != "weight":
            yield f"tensor '{name}' is there, but '{module}.{anchor}' is missing"
        if info.dtype in CODES and name in known:
            yield f"tensor '{name}' holds codes ({info.dtype}), but '{module}.{anchor}' is missing"
    for module in source.schemes:
        yield from _of_module(source, module)
    yield from _of_cache(source)


def _of_module(source: WeightSource, module: str) -> Iterator[str]:
    scheme, tensors = source.schemes[module], source.checkpoint.tensors
    assert source.format is not None
    parts, what = source.format.PARTS, describe_scheme(scheme)
    codes = "qweight" if "qweight" in parts else "weight_packed" if source.format.packs(scheme) else "weight"
    needed = [codes, "weight_shape"] if codes == "weight_packed" and not scheme.weights.fp4 else [codes]
    for part in needed:
        if f"{module}.{part}" not in tensors:
            yield f"tensor '{module}.{part}' is missing: {module} has {what}"
    weight = tensors[f"{module}.{codes}"]
    if len(weight.shape) != 2:
        yield f"tensor '{weight.name}' has shape {list(weight.shape)}; the weight of a Linear is a matrix"
    rows, cols = source.shape(module, populate=False)
    dtype = source.checkpoint.model_dtype or "F32"
    expected = {t.name: t for t in source.format.stored_tensors(module, scheme, rows, cols, dtype)}
    for name, want in expected.items():
        if name not in tensors:
            yield f"tensor '{name}' is missing: {module} has {what}"
        got = tensors[name]
        scale = name.rpartition(".")[2] in SCALES
        if got.dtype != want.dtype and not (scale and got.dtype in FLOATS and want.dtype in FLOATS):
            yield f"tensor '{name}' has dtype {got.dtype}, {what} need {want.dtype}"
        one = scale and want.shape in ((1,), (1, 1)) and got.shape in ((), (1,), (1, 1))
        if got.shape != want.shape and not one:
            yield (
                f"tensor '{name}' has shape {list(got.shape)}, a weight of {rows} x {cols} with {what} needs "
                f"{list(want.shape)}"
            )
    for part in parts:
        name = f"{module}.{part}"
        if name in tensors and name not in expected:
            yield f"tensor '{name}' does not belong to {what}"
        elif name in expected and part in INPUTS and not bool(source.checkpoint.tensor(name).float().isfinite().all()):
            yield f"tensor '{name}' has NaN or Inf in it"


def _of_cache(source: WeightSource) -> Iterator[str]:
    args, tensors = source.kv_cache, source.checkpoint.tensors
    if args is None:
        return
    assert source.format is not None
    scales = source.format.CACHE[:2]
    # Scales per channel are what MindIE's format has, and no other.
    strategies = ("channel",) if source.format.NAME == "mindie" else ("tensor", "attn_head")
    if args.dynamic or args.num_bits != 8 or not args.symmetric or args.strategy not in strategies:
        yield "kv_cache_scheme: only static symmetric 8-bit scales per tensor or head are read"
    if not source.cache_quantizers:
        yield f"kv_cache_scheme is set, but no attention module has {' and '.join(scales)}"
    for name in tensors:
        for part, other in zip(scales, reversed(scales), strict=True):
            attention = name.removesuffix(f".{part}")
            if attention != name and attention not in source.cache_quantizers:
                yield f"tensor '{name}' is there, but '{attention}.{other}' is missing"
    for attention in source.cache_quantizers:
        for name in source.cache_names(attention):
            value = source.checkpoint.tensor(name).float()
            heads = (query_heads if name.endswith(QUERY) else kv_heads)(source.checkpoint.config)
            count = heads if args.strategy == "attn_head" else 1
            if name.endswith("_scale") and args.strategy != "channel" and count not in (None, value.numel()):
                yield f"tensor '{name}' has {value.numel()} scales, strategy {args.strategy} has {count}"
            if name.endswith("_zero_point") and bool((value != 0).any()):
                yield f"tensor '{name}' is not zero, and kv_cache_scheme is symmetric"
            # Scales that nobody calibrated are whatever was in memory.
            if name.endswith(QUERY) and not calibrated(value):
                yield f"tensor '{name}' has scales not between {LEAST:g} and {MOST:g}; they were not calibrated"
        if f"{attention}.q_scale" in tensors and attention not in source.query_quantizers:
            yield f"tensor '{attention}.q_scale' is there, but no config group is for attention"
