"""quant_method "fp8": per-tensor e4m3 weights as vLLM and SGLang read them (`save_name: fp8`).

The tensors are those of compressed-tensors' per-tensor FP8; only the block in config.json differs. Transformers
reads other tensor names under this method, so it is written only when asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..config.schemes import QuantizationArgs, QuantizationScheme
from ..errors import ConfigError
from . import compressed_tensors as ct

if TYPE_CHECKING:
    from ..config.groups import SchemeGroup

NAME = "fp8"
VERSION = ""

packs = ct.packs
scale_dtype = ct.scale_dtype
stored_tensors = ct.stored_tensors
pack_weight = ct.pack_weight
pack_activations = ct.pack_activations
quantized_modules = ct.quantized_modules
load_weight = ct.load_weight
kv_tensors = ct.kv_tensors
kv_scales = ct.kv_scales


def check(scheme: QuantizationScheme) -> None:
    """ConfigError unless the scheme is per-tensor FP8 for weights and activations."""
    activations = scheme.input_activations
    if scheme.weights.type != "float" or scheme.weights.strategy != "tensor" or activations is None:
        raise ConfigError(
            f"save_name 'fp8' holds per-tensor FP8 weights and activations, not scheme {scheme.name}; "
            "use save_name 'compressed-tensors'"
        )


def config_block(
    groups: Sequence[SchemeGroup],
    ignore: Sequence[str],
    user_ignore: Sequence[str],
    kv_cache: QuantizationArgs | None = None,
) -> dict[str, Any]:
    """`quantization_config`; readers match `ignored_layers` against full module names, so these are written. It has no
    room for a second scheme. vLLM finds KV-cache scales by their names, if told to use an FP8 cache.
    """
    if len(groups) != 1:
        raise ConfigError(
            f"save_name 'fp8' holds one scheme, not {len(groups)} "
            f"({', '.join(group.scheme.name for group in groups) or 'none'}); use save_name 'compressed-tensors'"
        )
    if kv_cache is not None and (kv_cache.type, kv_cache.strategy) != ("float", "tensor"):
        raise ConfigError(
            "save_name 'fp8' holds per-tensor FP8 KV-cache scales only; use save_name 'compressed-tensors'"
        )
    inputs = groups[0].scheme.input_activations
    return {
        "activation_scheme": "dynamic" if inputs is None or inputs.dynamic else "static",
        "ignored_layers": list(ignore),
        "quant_method": NAME,
        **({"kv_cache_scheme": "static"} if kv_cache is not None else {}),
    }


def read_schemes(block: Mapping[str, Any]) -> ct.Schemes:
    """The scheme behind a `quantization_config` of this method, as `config_block` writes it."""
    dynamic = block.get("activation_scheme") != "static"
    if block.get("weight_block_size"):
        raise ConfigError("quant_method fp8 with weight_block_size is not read yet; only per-tensor FP8 is")
    weights = QuantizationArgs(8, "float", strategy="tensor")
    scheme = QuantizationScheme("FP8", weights, QuantizationArgs(8, "float", strategy="tensor", dynamic=dynamic))
    return ct.Schemes([(scheme, ["Linear"])])


def read_kv_cache(block: Mapping[str, Any]) -> QuantizationArgs | None:
    """How the block says that keys and values are cached, None for 16 bit."""
    return QuantizationArgs(8, "float", strategy="tensor") if block.get("kv_cache_scheme") else None
