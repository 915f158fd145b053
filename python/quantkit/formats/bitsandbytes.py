"""LLM.int8() as bitsandbytes stores it (quant_method "bitsandbytes", load_in_8bit): `save_name: bitsandbytes`.

Of a Linear [N, K]: `weight` int8 [N, K], `SCB` fp32 [N], the largest magnitude of each row, and `weight_format`, a byte
that is 0 (rows as they are); weight = code * SCB / 127. Activations are int8 per token, but for the columns with a
magnitude of `llm_int8_threshold` or more, which stay in 16 bit; a threshold of 0 is for none. The reader takes every
Linear for quantized that `llm_int8_skip_modules` does not name. Source: Linear8bitLt, and Transformers' quantizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..checkpoint.layout import OutputTensor
from ..config.presets import INT8_TOKEN, int_weights
from ..config.schemes import QuantizationArgs, QuantizationScheme
from ..errors import CheckpointError, ConfigError
from . import compressed_tensors as ct
from .rows import no_rows
from .single import no_cache, one_group, suffixed, weight_only

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..config.groups import SchemeGroup
    from ..quantized import QuantizedTensor

NAME = "bitsandbytes"
VERSION = ""
IN_CONFIG, FOLDS = "quantization_config", False
ZERO_POINT = "input_zero_point"  # the last name of a static input's
CACHE = ()
PARTS = ("weight", "SCB", "weight_format")
LARGEST = 127.0


def check(scheme: QuantizationScheme) -> None:
    """ConfigError unless the scheme is symmetric int8 weights per channel with symmetric int8 activations per token."""
    weights, inputs = scheme.weights, scheme.input_activations
    fits = (weights.type, weights.num_bits, weights.symmetric, weights.strategy) == ("int", 8, True, "channel")
    if not fits or inputs is None or replace(inputs, outlier_threshold=None) != INT8_TOKEN:
        raise ConfigError(
            f"save_name '{NAME}' holds symmetric int8 weights per channel with int8 activations per token, all of them "
            f"(W8A8) or but for outliers (LLM_INT8), not scheme {scheme.name}; use save_name 'compressed-tensors'"
        )


def packs(scheme: QuantizationScheme) -> bool:
    """Codes are stored as they are."""
    return False


def scale_name(scheme: QuantizationScheme) -> str:
    """The last name of the tensor with a weight's scales."""
    return "SCB"


def scale_dtype(scheme: QuantizationScheme, model_dtype: str) -> str:
    """fp32 whatever the model's dtype."""
    return "F32"


def stored_tensors(
    module: str, scheme: QuantizationScheme, rows: int, cols: int, model_dtype: str
) -> list[OutputTensor]:
    """What `module`'s weight becomes on disk, bias aside. ConfigError for an expert."""
    if ".experts." in module:
        raise ConfigError(
            f"{module}: Transformers holds experts as one 3-D parameter, which bitsandbytes does not quantize; add "
            "'re:.*experts.*' to ignore, or use save_name 'compressed-tensors'"
        )
    return [
        OutputTensor(f"{module}.weight", "I8", (rows, cols)),
        OutputTensor(f"{module}.SCB", "F32", (rows,)),
        OutputTensor(f"{module}.weight_format", "U8", ()),
    ]


def pack_weight(module: str, quantized: QuantizedTensor, scale_dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of `stored_tensors`."""
    import torch

    return {
        f"{module}.weight": quantized.codes,
        f"{module}.SCB": magnitudes(quantized.scale.reshape(-1)),
        f"{module}.weight_format": torch.zeros((), dtype=torch.uint8),
    }


def magnitudes(scale: Tensor) -> Tensor:
    """fp32 [n] whose 127th parts are `scale` [n]: exactly, for the scales of a range; else (1 in 128 of any) within
    2^-23 of it.
    """
    import torch

    nearest = scale.float() * LARGEST
    infinity = torch.full_like(nearest, torch.inf)
    for other in (torch.nextafter(nearest, infinity), torch.nextafter(nearest, -infinity)):
        better = (other / LARGEST - scale).abs() < (nearest / LARGEST - scale).abs()
        nearest = torch.where(better, other, nearest)
    return nearest


pack_activations, kv_tensors, kv_scales = weight_only(NAME)
read_kv_cache = no_cache
row_tensors = no_rows  # SCB is made of scales
stem, side_files = ct.stem, ct.side_files


def config_block(
    groups: Sequence[SchemeGroup],
    ignore: Sequence[str],
    user_ignore: Sequence[str],
    kv_cache: QuantizationArgs | None = None,
) -> dict[str, Any]:
    """`quantization_config` as Transformers writes it, with the full names of all Linears that are not quantized."""
    inputs = one_group(NAME, groups, kv_cache).input_activations
    return {
        "_load_in_4bit": False,
        "_load_in_8bit": True,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(ignore),
        "llm_int8_threshold": 0.0 if inputs is None else float(inputs.outlier_threshold or 0.0),
        "load_in_4bit": False,
        "load_in_8bit": True,
        "quant_method": NAME,
    }


def read_schemes(block: Mapping[str, Any]) -> ct.Schemes:
    """The one scheme behind a `quantization_config` of this method. CheckpointError for 4 bit and for weights that are
    quantized as they are read.
    """
    if block.get("load_in_4bit") or block.get("_load_in_4bit"):
        raise CheckpointError("quantization_config: bitsandbytes with load_in_4bit; read is load_in_8bit")
    if block.get("llm_int8_has_fp16_weight"):
        raise CheckpointError("quantization_config: llm_int8_has_fp16_weight is true; read are weights in int8")
    threshold = block.get("llm_int8_threshold", 6.0)
    if not isinstance(threshold, int | float) or not threshold >= 0:
        raise CheckpointError(f"quantization_config: llm_int8_threshold is {threshold!r}; read is a number from 0 on")
    inputs = replace(INT8_TOKEN, outlier_threshold=float(threshold) or None)
    scheme = QuantizationScheme("LLM_INT8" if threshold else "W8A8", int_weights(8), inputs)
    return ct.Schemes([(scheme, ["Linear"])])


def quantized_modules(tensors: Iterable[str]) -> list[str]:
    """The modules of a checkpoint that carry codes."""
    return suffixed(tensors, "SCB")


def shape(module: str, scheme: QuantizationScheme, get: Any) -> tuple[int, int]:
    """[rows, cols] of the weight behind `module`'s tensors."""
    rows, cols = get(f"{module}.weight").shape
    return int(rows), int(cols)


def load_scale(module: str, scheme: QuantizationScheme, get: Any) -> Tensor:
    """fp32 [rows, 1]."""
    found: Tensor = get(f"{module}.SCB").float().reshape(-1, 1) / LARGEST
    return found


def load_zero_point(module: str, scheme: QuantizationScheme, get: Any, rows: int) -> Tensor | None:
    """None: weights are symmetric."""
    return None


def load_weight(module: str, scheme: QuantizationScheme, get: Any, rows: int, cols: int) -> QuantizedTensor:
    """The inverse of `pack_weight`. CheckpointError for columns in an order of a GPU's."""
    from ..quantized import QuantizedTensor

    try:
        order = int(get(f"{module}.weight_format"))
    except (KeyError, CheckpointError):
        order = 0  # older writers leave it out
    if order != 0:
        raise CheckpointError(f"{module}.weight_format: {order}, an order of a GPU's kernels; read are rows (0)")
    scale = load_scale(module, scheme, get)
    return QuantizedTensor(get(f"{module}.weight"), scale, None, scheme.weights, rows, cols)
