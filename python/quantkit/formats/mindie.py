"""Ascend MindIE's W8A8 (`save_name: mindie`), as msModelSlim writes it and MindIE, vLLM-Ascend and SGLang read it.

A static W8A8 Linear [n, k] is `weight` int8 [n, k], `input_scale` and `input_offset` [1] in the model's dtype,
`quant_bias` int32 [n], `deq_scale` [n], fp32 for a bf16 model and the bits of fp32 in int64 for an fp16 one, and
`weight_scale` fp32 [n, 1] with `weight_offset`, zeros. `W8A8_DYNAMIC` (experts must be it) and `W8A16` have weight,
weight_scale and weight_offset. A KV cache in int8 is in `mindie_cache`. What each tensor is stands in
`quant_model_description.json`; config.json says nothing.
Source: the format's documentation and the loaders of MindIE-LLM and vLLM-Ascend.

The NPU computes q = rint(x * r + offset) with r = 1 / input_scale in the model's dtype, and (q @ weight.T + quant_bias)
* deq_scale. So input_scale is the one of the next few numbers of that dtype whose r is nearest to its inverse, and
deq_scale of an fp16 model is rounded to the 19 bits that the hardware keeps, which would cut off the rest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..checkpoint.folder import DESCRIPTION
from ..checkpoint.layout import OutputTensor
from ..config.schemes import QuantizationArgs, QuantizationScheme
from ..errors import CheckpointError, ConfigError
from .compressed_tensors import Schemes
from .mindie_cache import CACHE, KEYS, KIND, kv_scales, kv_tensors, snapped
from .rows import RowTensors
from .single import suffixed

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..config.groups import SchemeGroup
    from ..quantized import QuantizedTensor
    from .folded import Folded

__all__ = ["CACHE", "kv_scales", "kv_tensors", "snapped"]

NAME = "mindie"
VERSION = "1.0.0"
PARTS = ("weight", "weight_scale", "weight_offset", "input_scale", "input_offset", "quant_bias", "deq_scale")
IN_CONFIG = "quantize"
FOLDS = True
ZERO_POINT = "input_offset"
# Kinds, the one that names the model first.
KINDS = ("W8A8", "W8A8_DYNAMIC", "W8A16")
FP19 = 13  # bits of fp32's mantissa that the fp16 path of the hardware does not keep


def kind_of(scheme: QuantizationScheme) -> str | None:
    """The format's name for a scheme, None if it has none."""
    weights, inputs = scheme.weights, scheme.input_activations
    if (weights.type, weights.num_bits, weights.symmetric, weights.strategy) != ("int", 8, True, "channel"):
        return None
    if inputs is None:
        return "W8A16"
    if inputs.type != "int" or inputs.outlier_threshold is not None:
        return None
    if not inputs.dynamic:
        return "W8A8"
    return "W8A8_DYNAMIC" if inputs.strategy == "token" and inputs.symmetric else None


def check(scheme: QuantizationScheme) -> None:
    """ConfigError unless the scheme is int8 weights per channel, activations static, dynamic per token, or 16 bit."""
    if kind_of(scheme) is None:
        raise ConfigError(
            f"save_name '{NAME}' holds symmetric int8 weights per channel, with activations in int8, static per tensor "
            f"or dynamic per token, or in 16 bit, not scheme {scheme.name}; use save_name 'compressed-tensors'"
        )


def packs(scheme: QuantizationScheme) -> bool:
    """Codes are stored as they are."""
    return False


def scale_name(scheme: QuantizationScheme) -> str:
    """The last name of the tensor with a weight's scales."""
    return "weight_scale"


def scale_dtype(scheme: QuantizationScheme, model_dtype: str) -> str:
    """fp32 whatever the model's dtype."""
    return "F32"


def stem(schemes: Iterable[QuantizationScheme]) -> str:
    """What the weight files are called."""
    return f"quant_model_weight_{_name_of(schemes).lower()}"


def _name_of(schemes: Iterable[QuantizationScheme]) -> str:
    kinds = {kind_of(scheme) for scheme in schemes}
    if not kinds:
        raise ConfigError(f"save_name '{NAME}': a KV cache in int8 goes with quantized Linears; the recipe has none")
    return next(kind for kind in KINDS if kind in kinds)


def stored_tensors(
    module: str, scheme: QuantizationScheme, rows: int, cols: int, model_dtype: str
) -> list[OutputTensor]:
    """What `module`'s weight and input become on disk, bias aside. ConfigError for a model in fp32, and for an expert
    with static inputs.
    """
    tensors = [
        OutputTensor(f"{module}.weight", "I8", (rows, cols)),
        OutputTensor(f"{module}.weight_scale", "F32", (rows, 1)),
        OutputTensor(f"{module}.weight_offset", "F32", (rows, 1)),
    ]
    if kind_of(scheme) != "W8A8":
        return tensors
    if ".experts." in module:
        raise ConfigError(
            f"{module}: experts with static inputs are not served on an NPU; give them scheme W8A8 in a recipe: "
            "{scheme: {W8A8_STATIC_ASYM: [Linear], W8A8: ['re:.*experts.*']}}"
        )
    if model_dtype not in ("BF16", "F16"):
        raise ConfigError(
            f"{module}: its weight is {model_dtype}; save_name '{NAME}' is for models in bfloat16 and float16"
        )
    return [
        *tensors,
        OutputTensor(f"{module}.input_scale", model_dtype, (1,)),
        OutputTensor(f"{module}.input_offset", model_dtype, (1,)),
        OutputTensor(f"{module}.quant_bias", "I32", (rows,)),
        OutputTensor(f"{module}.deq_scale", "F32" if model_dtype == "BF16" else "I64", (rows,)),
    ]


def row_tensors(module: str, scheme: QuantizationScheme, rows: int, cols: int) -> RowTensors | None:
    """See `RowTensors`."""
    zeros = {f"{module}.weight_offset": bytes(4 * rows)}
    return RowTensors(f"{module}.weight", f"{module}.weight_scale", None, zeros)


def pack_weight(module: str, quantized: QuantizedTensor, scale_dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of `stored_tensors` that come from the weight alone."""
    import torch

    return {
        f"{module}.weight": quantized.codes,
        f"{module}.weight_scale": quantized.scale,
        f"{module}.weight_offset": torch.zeros_like(quantized.scale),
    }


def pack_activations(
    module: str,
    scale: Tensor,
    zero_point: Tensor | None,
    folded: Folded | None = None,
    args: QuantizationArgs | None = None,
) -> dict[str, Tensor]:
    """The tensors of a static input (scale fp32, zero point int8), with what its weight makes of them. CheckpointError
    for a bias that int32 cannot hold in units of the products.
    """
    import torch

    assert folded is not None
    s = snapped(scale.reshape(1), folded.dtype)
    offset = torch.zeros(1, dtype=torch.int8) if zero_point is None else zero_point.reshape(1)
    exact = s.float() * folded.scale.reshape(-1)
    bias = torch.zeros_like(exact) if folded.bias is None else folded.bias.float()
    correction = bias.double() / exact.double() - int(offset) * folded.row_sums.double()
    quant_bias = torch.round(correction)
    if bool((quant_bias.abs() >= 2**31).any()):
        row = int(quant_bias.abs().argmax())
        raise CheckpointError(
            f"{module}: the bias of row {row} is {float(quant_bias[row]):.1e} units of its int8 products, which int32 "
            "does not hold; leave this layer out (its weights in that row are next to zero)"
        )
    return {
        f"{module}.input_scale": s,
        f"{module}.input_offset": offset.to(folded.dtype),
        f"{module}.quant_bias": quant_bias.to(torch.int32),
        f"{module}.deq_scale": exact if folded.dtype == torch.bfloat16 else as_bits(exact),
    }


def as_bits(scale: Tensor) -> Tensor:
    """fp32 [n] as int64 [n] with its bits, rounded to those that the hardware keeps."""
    import torch

    half = 1 << (FP19 - 1)
    bits = scale.contiguous().view(torch.int32).to(torch.int64)
    return (bits + half) & ~((1 << FP19) - 1)


def config_block(
    groups: Sequence[SchemeGroup],
    ignore: Sequence[str],
    user_ignore: Sequence[str],
    kv_cache: QuantizationArgs | None = None,
) -> dict[str, Any]:
    """The description without its tensors, and what names the format; it is kept out of config.json."""
    return {
        "quant_method": NAME,
        "model_quant_type": _name_of(group.scheme for group in groups),
        "version": VERSION,
        "group_size": 0,
        **({} if kv_cache is None else dict.fromkeys(KEYS, KIND)),
    }


def side_files(
    block: Mapping[str, Any], tensors: Iterable[str], schemes: Mapping[str, QuantizationScheme]
) -> dict[str, bytes]:
    """The description: the block, and what each tensor is."""
    described = {key: value for key, value in block.items() if key != "quant_method"}
    for name in tensors:
        module, _, part = name.rpartition(".")
        if module in schemes and part in PARTS:
            described[name] = str(kind_of(schemes[module]))
        else:
            described[name] = KIND if name.endswith(CACHE) else "FLOAT"
    described.setdefault("lm_head.weight", "FLOAT")  # a tied head has no tensor, and loaders look it up
    return {DESCRIPTION: (json.dumps(described, indent=2, ensure_ascii=False) + "\n").encode()}


def read_schemes(block: Mapping[str, Any]) -> Schemes:
    """The scheme of each module, by the description. CheckpointError for kinds that are not read."""
    weights = QuantizationArgs(8, "int", strategy="channel")
    inputs = {
        "W8A8": QuantizationArgs(8, "int", symmetric=False, strategy="tensor"),
        "W8A8_DYNAMIC": QuantizationArgs(8, "int", strategy="token", dynamic=True),
        "W8A16": None,
    }
    found: dict[str, list[str]] = {}
    for name, kind in block.items():
        if name.endswith(".weight") and kind != "FLOAT":
            if not isinstance(kind, str) or kind not in inputs:
                raise CheckpointError(f"{DESCRIPTION}: {name} is '{kind}'; read are {', '.join(KINDS)} and FLOAT")
            module = name.removesuffix(".weight")
            found.setdefault(kind, []).append(module)
            for part in (f"{module}.{part}" for part in PARTS):
                if block.get(part, kind) != kind:
                    raise CheckpointError(f"{DESCRIPTION}: {part} is '{block[part]}', and {name} '{kind}'")
    return Schemes([(QuantizationScheme(kind, weights, inputs[kind]), names) for kind, names in found.items()])


def read_kv_cache(block: Mapping[str, Any]) -> QuantizationArgs | None:
    """int8 per channel where the description has C8; CheckpointError for another kind of cache."""
    kinds = [block[key] for key in KEYS if block.get(key)]
    if any(kind != KIND for kind in kinds):
        raise CheckpointError(f"{DESCRIPTION}: a KV cache of kind {', '.join(map(str, kinds))} is not read; read is C8")
    return QuantizationArgs(8, "int", strategy="channel") if kinds else None


def quantized_modules(tensors: Iterable[str]) -> list[str]:
    """The modules of a checkpoint that carry codes."""
    names = list(tensors)
    return list(dict.fromkeys([*suffixed(names, "weight_scale"), *suffixed(names, "deq_scale")]))


def shape(module: str, scheme: QuantizationScheme, get: Any) -> tuple[int, int]:
    """[rows, cols] of the weight behind `module`'s tensors."""
    rows, cols = get(f"{module}.weight").shape
    return int(rows), int(cols)


def load_scale(module: str, scheme: QuantizationScheme, get: Any) -> Tensor:
    """fp32 [rows, 1]. Newer tools write no weight_scale for static inputs; it is in deq_scale then."""
    try:
        scale: Tensor = get(f"{module}.weight_scale").float()
    except (KeyError, CheckpointError):
        scale = dequantizing_scale(get(f"{module}.deq_scale")) / get(f"{module}.input_scale").float()
    return scale.reshape(-1, 1)


def load_zero_point(module: str, scheme: QuantizationScheme, get: Any, rows: int) -> Tensor | None:
    """None: weights are symmetric."""
    return None


def load_weight(module: str, scheme: QuantizationScheme, get: Any, rows: int, cols: int) -> QuantizedTensor:
    """The codes and scales."""
    from ..quantized import QuantizedTensor

    scale = load_scale(module, scheme, get)
    return QuantizedTensor(get(f"{module}.weight"), scale, None, scheme.weights, rows, cols)


def dequantizing_scale(stored: Tensor) -> Tensor:
    """`deq_scale` as the hardware reads it: fp32 [n]."""
    import torch

    if stored.dtype == torch.int64:
        return (stored & 0xFFFFFFFF & ~((1 << FP19) - 1)).to(torch.int32).view(torch.float32)
    return stored.float()


def emulate(
    x: Tensor, weight: Tensor, input_scale: Tensor, input_offset: Tensor, quant_bias: Tensor, deq_scale: Tensor
) -> Tensor:
    """What the NPU computes for a static W8A8 Linear: x [tokens, k] in the model's dtype -> [tokens, n] in it; the rest
    are the stored tensors. Reference: `npu_quantize` (not div_mode) and `npu_quant_matmul`; int32 sums are exact.
    """
    import torch

    dtype = x.dtype
    r = (1 / input_scale.to(dtype).float()).to(dtype).float()
    q = torch.round(x.float() * r + input_offset.to(dtype).float()).clamp(-128, 127)
    # fp64 holds every sum of int8 products and int32 biases exactly.
    total = q.double() @ weight.double().t() + quant_bias.double()
    return (total.float() * dequantizing_scale(deq_scale)).to(dtype)
