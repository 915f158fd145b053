"""AWQ's gemm layout (quant_method "awq"), as vLLM, SGLang and GPTQModel read it: `save_name: awq`.

Of a Linear [N, K] in 4 bits: `qweight` int32 [K, N/8], nibble i of word c being output 8c + ORDER[i]; `qzeros` int32
[G, N/8] likewise; `scales` fp16 [G, N]. Codes and zero points are unsigned, weight = (q - z) * scale. Zero points are
always there: symmetric weights have the middle code. Source: AutoAWQ's gemm packing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..checkpoint.layout import OutputTensor
from ..config.schemes import QuantizationArgs, QuantizationScheme
from ..errors import CheckpointError, ConfigError
from . import compressed_tensors as ct
from .rows import no_rows
from .single import fp16, fp16_scales, no_cache, one_group, require_key, weight_only, with_qweight

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..config.groups import SchemeGroup
    from ..quantized import QuantizedTensor

NAME = "awq"
VERSION = ""
# Whether config.json has the block, and whether input scales take in the weight and bias.
IN_CONFIG, FOLDS = "quantization_config", False
ZERO_POINT = "input_zero_point"  # the last name of a static input's
CACHE = ()
PARTS = ("qweight", "qzeros", "scales")
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def check(scheme: QuantizationScheme) -> None:
    """ConfigError unless the scheme is weight-only int4 per group, columns in their own order."""
    weights = scheme.weights
    grouped = weights.strategy in ("group", "channel") and weights.actorder != "group"
    if (weights.type, weights.num_bits) != ("int", 4) or scheme.input_activations is not None or not grouped:
        raise ConfigError(
            f"save_name '{NAME}' holds weight-only int4 per group, columns in their own order, not scheme "
            f"{scheme.name}; use save_name 'compressed-tensors'"
        )


def packs(scheme: QuantizationScheme) -> bool:
    """Codes are packed along the outputs, not as they are made."""
    return False


def stored_tensors(
    module: str, scheme: QuantizationScheme, rows: int, cols: int, model_dtype: str
) -> list[OutputTensor]:
    """What `module`'s weight becomes on disk, bias aside. ConfigError if its outputs are no whole words."""
    if rows % 8:
        raise ConfigError(
            f"{module}: {rows} outputs; save_name '{NAME}' packs 8 a word; use save_name 'compressed-tensors', or "
            "ignore this layer"
        )
    groups = -(-cols // (scheme.weights.group_size or cols))
    return [
        OutputTensor(f"{module}.qweight", "I32", (cols, rows // 8)),
        OutputTensor(f"{module}.qzeros", "I32", (groups, rows // 8)),
        OutputTensor(f"{module}.scales", "F16", (groups, rows)),
    ]


def _pack(codes: Tensor) -> Tensor:
    """int8 [N, X] -> int32 [X, N/8]."""
    from .. import ops

    rows = codes.t().reshape(codes.shape[1], -1, 8)[:, :, list(ORDER)]
    return ops.pack_int32(rows.reshape(codes.shape[1], codes.shape[0]).contiguous(), 4)


def _unpack(words: Tensor) -> Tensor:
    """int32 [X, N/8] -> int8 [N, X]."""
    import torch

    from .. import ops

    codes = ops.unpack_int32(words.contiguous(), 4, words.shape[1] * 8).view(words.shape[0], -1, 8)
    result = torch.empty_like(codes)
    result[:, :, list(ORDER)] = codes
    return result.view(words.shape[0], -1).t().contiguous()


def pack_weight(module: str, quantized: QuantizedTensor, scale_dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of `stored_tensors`."""
    import torch

    zeros = quantized.zero_point
    if zeros is None:
        zeros = torch.zeros(quantized.scale.shape, dtype=torch.int8)
    return {
        f"{module}.qweight": _pack(quantized.unpacked()),
        f"{module}.qzeros": _pack(zeros),
        f"{module}.scales": quantized.scale.t().to(scale_dtype).contiguous(),
    }


pack_activations, kv_tensors, kv_scales = weight_only(NAME)
read_kv_cache = no_cache
row_tensors = no_rows  # they are its columns
scale_name, scale_dtype, quantized_modules = fp16_scales, fp16, with_qweight
stem = ct.stem
side_files = ct.side_files


def config_block(
    groups: Sequence[SchemeGroup],
    ignore: Sequence[str],
    user_ignore: Sequence[str],
    kv_cache: QuantizationArgs | None = None,
) -> dict[str, Any]:
    """`quantization_config`; readers look for each of `modules_to_not_convert` within a module's name."""
    weights = one_group(NAME, groups, kv_cache).weights
    return {
        "bits": 4,
        "group_size": weights.group_size or -1,
        "modules_to_not_convert": list(ignore),
        "quant_method": NAME,
        "version": "gemm",
        "zero_point": True,
    }


def read_schemes(block: Mapping[str, Any]) -> ct.Schemes:
    """The one scheme behind a `quantization_config` of this method. CheckpointError for what is not read."""
    bits, size = require_key(block, "bits", "w_bit"), require_key(block, "group_size", "q_group_size")
    version = str(block.get("version", "gemm")).lower()
    if bits != 4 or version != "gemm" or not isinstance(size, int) or size == 0:
        raise CheckpointError(
            f"quantization_config: awq version {version} with bits {bits} and group_size {size}; read is gemm with 4 "
            "bits"
        )
    grouped = size > 0
    weights = QuantizationArgs(4, "int", False, "group" if grouped else "channel", size if grouped else None)
    kept = ct.names_of("modules_to_not_convert", block.get("modules_to_not_convert"))
    return ct.Schemes([(QuantizationScheme("AWQ", weights), ["Linear"])], kept, "modules_to_not_convert")


def shape(module: str, scheme: QuantizationScheme, get: Any) -> tuple[int, int]:
    """[rows, cols] of the weight behind `module`'s tensors."""
    words = get(f"{module}.qweight")
    return int(words.shape[1]) * 8, int(words.shape[0])


def load_scale(module: str, scheme: QuantizationScheme, get: Any) -> Tensor:
    """The weight's scales, fp32 [rows, groups]."""
    found: Tensor = get(f"{module}.scales").t().float().contiguous()
    return found


def load_zero_point(module: str, scheme: QuantizationScheme, get: Any, rows: int) -> Tensor | None:
    """The weight's zero points, int8 [rows, groups]; they are always there."""
    return _unpack(get(f"{module}.qzeros"))


def load_weight(module: str, scheme: QuantizationScheme, get: Any, rows: int, cols: int) -> QuantizedTensor:
    """The inverse of `pack_weight`."""
    from ..quantized import QuantizedTensor

    codes, zeros = _unpack(get(f"{module}.qweight")), load_zero_point(module, scheme, get, rows)
    return QuantizedTensor(codes, load_scale(module, scheme, get), zeros, scheme.weights, rows, cols)
