"""quant_method "fp8": per-tensor e4m3 weights as vLLM and SGLang read them (`save_name: fp8`).

The tensors are those of compressed-tensors' per-tensor FP8; only the block in config.json differs. Transformers
reads other tensor names under this method, so it is written only when asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..config.schemes import QuantizationArgs, QuantizationScheme
from ..errors import ConfigError
from . import compressed_tensors as ct

NAME = "fp8"
VERSION = ""

packs = ct.packs
scale_dtype = ct.scale_dtype
stored_tensors = ct.stored_tensors
pack_weight = ct.pack_weight
pack_activations = ct.pack_activations
quantized_modules = ct.quantized_modules
load_weight = ct.load_weight


def check(scheme: QuantizationScheme) -> None:
    """ConfigError unless the scheme is per-tensor FP8 for weights and activations."""
    activations = scheme.input_activations
    if scheme.weights.type != "float" or scheme.weights.strategy != "tensor" or activations is None:
        raise ConfigError(
            f"save_name 'fp8' holds per-tensor FP8 weights and activations, not scheme {scheme.name}; "
            "use save_name 'compressed-tensors'"
        )


def config_block(scheme: QuantizationScheme, ignore: Sequence[str], user_ignore: Sequence[str]) -> dict[str, Any]:
    """`quantization_config`; readers match `ignored_layers` against full module names, so these are written."""
    dynamic = scheme.input_activations is None or scheme.input_activations.dynamic
    return {
        "activation_scheme": "dynamic" if dynamic else "static",
        "ignored_layers": list(ignore),
        "quant_method": NAME,
    }


def read_scheme(block: Mapping[str, Any]) -> QuantizationScheme:
    """The scheme behind a `quantization_config` of this method, as `config_block` writes it."""
    dynamic = block.get("activation_scheme") != "static"
    if block.get("weight_block_size"):
        raise ConfigError("quant_method fp8 with weight_block_size is not read yet; only per-tensor FP8 is")
    weights = QuantizationArgs(8, "float", strategy="tensor")
    return QuantizationScheme("FP8", weights, QuantizationArgs(8, "float", strategy="tensor", dynamic=dynamic))
