"""quant_method "fp8" (`save_name: fp8`): e4m3 weights per block of 128 x 128, as DeepSeek and Qwen publish them, or per
tensor.

Per block, the fp32 scales are `weight_scale_inv` [ceil(N/128), ceil(K/128)], multiplied by in spite of the name, and
every reader takes them. Per tensor, the tensors are those of compressed-tensors, as vLLM and SGLang read them;
Transformers reads other names under this method, so that is written only when asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..checkpoint.layout import OutputTensor
from ..config.schemes import QuantizationArgs, QuantizationScheme
from ..errors import CheckpointError, ConfigError
from . import compressed_tensors as ct
from .rows import RowTensors
from .single import one_group, suffixed

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..config.groups import SchemeGroup
    from ..quantized import QuantizedTensor

NAME = "fp8"
VERSION = ""

IN_CONFIG, FOLDS, ZERO_POINT, CACHE = ct.IN_CONFIG, ct.FOLDS, ct.ZERO_POINT, ct.CACHE
PARTS = ("weight", "weight_scale", "weight_scale_inv", "input_scale")
BLOCK = (128, 128)

packs = ct.packs
scale_dtype = ct.scale_dtype
pack_activations = ct.pack_activations
kv_tensors = ct.kv_tensors
kv_scales = ct.kv_scales
side_files = ct.side_files
stem = ct.stem
shape = ct.shape


def check(scheme: QuantizationScheme) -> None:
    """ConfigError unless weights and activations are FP8: per tensor, or per block and dynamic group."""
    weights, inputs = scheme.weights, scheme.input_activations
    per_tensor = weights.strategy == "tensor"
    blocks = weights.block_structure == BLOCK and inputs is not None and inputs.dynamic and inputs.strategy == "group"
    if weights.type != "float" or inputs is None or not (per_tensor or blocks):
        raise ConfigError(
            f"save_name 'fp8' holds FP8 weights and activations, per tensor or per block of 128 x 128, not scheme "
            f"{scheme.name}; use save_name 'compressed-tensors'"
        )


def scale_name(scheme: QuantizationScheme) -> str:
    """The last name of the tensor with a weight's scales."""
    return "weight_scale_inv" if scheme.weights.strategy == "block" else "weight_scale"


def _renamed(module: str, scheme: QuantizationScheme, name: str) -> str:
    return f"{module}.{scale_name(scheme)}" if name == f"{module}.weight_scale" else name


def stored_tensors(
    module: str, scheme: QuantizationScheme, rows: int, cols: int, model_dtype: str
) -> list[OutputTensor]:
    """What `module`'s weight becomes on disk, bias aside."""
    stored = ct.stored_tensors(module, scheme, rows, cols, model_dtype)
    return [replace(tensor, name=_renamed(module, scheme, tensor.name)) for tensor in stored]


def row_tensors(module: str, scheme: QuantizationScheme, rows: int, cols: int) -> RowTensors | None:
    """See `RowTensors`."""
    return RowTensors(f"{module}.weight", f"{module}.{scale_name(scheme)}")


def pack_weight(module: str, quantized: QuantizedTensor, scale_dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of `stored_tensors` that come from the weight."""
    scheme = QuantizationScheme("FP8", quantized.args)
    packed = ct.pack_weight(module, quantized, scale_dtype)
    return {_renamed(module, scheme, name): tensor for name, tensor in packed.items()}


def config_block(
    groups: Sequence[SchemeGroup],
    ignore: Sequence[str],
    user_ignore: Sequence[str],
    kv_cache: QuantizationArgs | None = None,
) -> dict[str, Any]:
    """`quantization_config`; readers match what is left out against full module names, so these are written. It has no
    room for a second scheme. vLLM finds KV-cache scales by their names, if told to use an FP8 cache.
    """
    scheme = one_group(NAME, groups, None)
    if kv_cache is not None and (kv_cache.type, kv_cache.strategy) != ("float", "tensor"):
        raise ConfigError(
            "save_name 'fp8' holds per-tensor FP8 KV-cache scales only; use save_name 'compressed-tensors'"
        )
    cache = {"kv_cache_scheme": "static"} if kv_cache is not None else {}
    if scheme.weights.strategy == "block":
        return {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "modules_to_not_convert": list(ignore),
            "quant_method": NAME,
            "weight_block_size": list(BLOCK),
            **cache,
        }
    inputs = scheme.input_activations
    return {
        "activation_scheme": "dynamic" if inputs is None or inputs.dynamic else "static",
        "ignored_layers": list(ignore),
        "quant_method": NAME,
        **cache,
    }


def read_schemes(block: Mapping[str, Any]) -> ct.Schemes:
    """The scheme behind a `quantization_config` of this method, as `config_block` writes it."""
    if block.get("weight_scale_semantics") == "inverse":
        raise CheckpointError(
            "quantization_config: weight_scale_semantics is inverse: GPTQModel's own FP8, whose weight_scale_inv "
            "divides; read is quant_method fp8 as DeepSeek, vLLM and SGLang have it, whose scales multiply"
        )
    activations, fmt = block.get("activation_scheme", "dynamic"), block.get("fmt") or "e4m3"
    if activations not in ("static", "dynamic"):
        raise CheckpointError(
            f"quantization_config: activation_scheme is {activations!r}; there are static and dynamic"
        )
    if fmt not in ("e4m3", "float8_e4m3fn"):
        raise CheckpointError(f"quantization_config: fmt is {fmt!r}; read is e4m3")
    dynamic = activations == "dynamic"
    key = "ignored_layers" if block.get("ignored_layers") else "modules_to_not_convert"
    ignored = ct.names_of(key, block.get(key))
    size = block.get("weight_block_size")
    if size:
        if not (isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)):
            raise CheckpointError(f"quantization_config: weight_block_size is {size}; read is [rows, columns]")
        if not dynamic:
            raise CheckpointError("quantization_config: activation_scheme static does not go with weight_block_size")
        weights = QuantizationArgs(8, "float", strategy="block", block_structure=(size[0], size[1]))
        inputs = QuantizationArgs(8, "float", strategy="group", group_size=size[1], dynamic=True)
        return ct.Schemes([(QuantizationScheme("FP8_BLOCK", weights, inputs), ["Linear"])], ignored, key)
    weights = QuantizationArgs(8, "float", strategy="tensor")
    scheme = QuantizationScheme("FP8", weights, QuantizationArgs(8, "float", strategy="tensor", dynamic=dynamic))
    return ct.Schemes([(scheme, ["Linear"])], ignored, key)


def quantized_modules(tensors: Iterable[str]) -> list[str]:
    """The modules of a checkpoint that carry codes."""
    names = list(tensors)
    return [*suffixed(names, "weight_scale"), *suffixed(names, "weight_scale_inv")]


def load_scale(module: str, scheme: QuantizationScheme, get: Any) -> Tensor:
    """The weight's scales, fp32 [grid rows, grid cols]."""
    return ct.load_scale(module, scheme, lambda name: get(_renamed(module, scheme, name)))


load_zero_point = ct.load_zero_point


def load_weight(module: str, scheme: QuantizationScheme, get: Any, rows: int, cols: int) -> QuantizedTensor:
    """The inverse of `pack_weight`."""
    return ct.load_weight(module, scheme, lambda name: get(_renamed(module, scheme, name)), rows, cols)


def read_kv_cache(block: Mapping[str, Any]) -> QuantizationArgs | None:
    """How the block says that keys and values are cached, None for 16 bit."""
    return QuantizationArgs(8, "float", strategy="tensor") if block.get("kv_cache_scheme") else None
