"""Schemes by name. Those that llm-compressor has too mean the same here, down to the fields; the rest are ours."""

from __future__ import annotations

import re
from dataclasses import replace

from ..errors import ConfigError, nearest
from .schemes import QuantizationArgs, QuantizationScheme

WEIGHTS = "minmax"
STATIC = "static_minmax"


def int_weights(num_bits: int, group_size: int | None = None, symmetric: bool = True) -> QuantizationArgs:
    """Integer weights per group, or per output channel without a group size."""
    return QuantizationArgs(
        num_bits, "int", symmetric, "group" if group_size else "channel", group_size, observer=WEIGHTS
    )


FP8_TENSOR_WEIGHTS = QuantizationArgs(8, "float", strategy="tensor", observer=WEIGHTS)
FP8_CHANNEL_WEIGHTS = QuantizationArgs(8, "float", strategy="channel", observer=WEIGHTS)
FP8_BLOCK_WEIGHTS = QuantizationArgs(8, "float", strategy="block", block_structure=(128, 128), observer=WEIGHTS)

INT8_TOKEN = QuantizationArgs(8, "int", strategy="token", dynamic=True)
INT8_TOKEN_ASYM = QuantizationArgs(8, "int", symmetric=False, strategy="token", dynamic=True)
INT8_STATIC = QuantizationArgs(8, "int", strategy="tensor", observer=STATIC)
INT8_STATIC_ASYM = QuantizationArgs(8, "int", symmetric=False, strategy="tensor", observer=STATIC)
FP8_TOKEN = QuantizationArgs(8, "float", strategy="token", dynamic=True)
FP8_TENSOR = QuantizationArgs(8, "float", strategy="tensor", dynamic=True)
FP8_STATIC = QuantizationArgs(8, "float", strategy="tensor", observer=STATIC)
FP8_GROUP = QuantizationArgs(8, "float", strategy="group", group_size=128, dynamic=True)
MXFP8 = QuantizationArgs(8, "float", strategy="group", group_size=32)
MXFP4 = QuantizationArgs(4, "float", strategy="group", group_size=32)
NVFP4 = QuantizationArgs(4, "float", strategy="tensor_group", group_size=16)
NVFP4_LOCAL = replace(NVFP4, dynamic="local", observer=STATIC)

PRESETS: dict[str, QuantizationScheme] = {
    scheme.name: scheme
    for scheme in (
        QuantizationScheme("W8A8", int_weights(8), INT8_TOKEN),
        QuantizationScheme("INT8", int_weights(8), INT8_TOKEN),
        QuantizationScheme("W4A16", int_weights(4, 128)),
        QuantizationScheme("W4A16_ASYM", int_weights(4, 128, symmetric=False)),
        QuantizationScheme("W8A16", int_weights(8, 128)),
        QuantizationScheme("W4A8", int_weights(4, 128), INT8_TOKEN),
        QuantizationScheme("FP8", FP8_TENSOR_WEIGHTS, FP8_STATIC),
        QuantizationScheme("FP8_DYNAMIC", FP8_CHANNEL_WEIGHTS, FP8_TOKEN),
        QuantizationScheme("FP8_BLOCK", FP8_BLOCK_WEIGHTS, FP8_GROUP),
        QuantizationScheme("W4AFP8", int_weights(4, 128), FP8_TOKEN),
        QuantizationScheme("MXFP8", replace(MXFP8, observer=WEIGHTS), replace(MXFP8, dynamic=True)),
        QuantizationScheme("MXFP8A16", replace(MXFP8, observer=WEIGHTS)),
        QuantizationScheme("MXFP4", replace(MXFP4, observer=WEIGHTS), replace(MXFP4, dynamic=True)),
        QuantizationScheme("MXFP4A16", replace(MXFP4, observer=WEIGHTS)),
        QuantizationScheme("NVFP4", replace(NVFP4, observer=WEIGHTS), NVFP4_LOCAL),
        QuantizationScheme("NVFP4A16", replace(NVFP4, observer=WEIGHTS)),
        # Not in llm-compressor, where these have to be spelled out as config groups.
        QuantizationScheme("W8A8_ASYM", int_weights(8), INT8_TOKEN_ASYM),
        QuantizationScheme("W8A8_STATIC", int_weights(8), INT8_STATIC),
        QuantizationScheme("W8A8_STATIC_ASYM", int_weights(8), INT8_STATIC_ASYM),
        QuantizationScheme("LLM_INT8", int_weights(8), replace(INT8_TOKEN, outlier_threshold=6.0)),
        QuantizationScheme("W4A16_CHANNEL", int_weights(4)),
        QuantizationScheme("W4A16_CHANNEL_ASYM", int_weights(4, symmetric=False)),
        QuantizationScheme("W8A16_ASYM", int_weights(8, 128, symmetric=False)),
        QuantizationScheme("W8A16_CHANNEL", int_weights(8)),
        QuantizationScheme("W8A16_CHANNEL_ASYM", int_weights(8, symmetric=False)),
        QuantizationScheme("FP8_PER_TENSOR_DYNAMIC", FP8_TENSOR_WEIGHTS, FP8_TENSOR),
    )
}

LLM_COMPRESSOR = (
    *("W8A8", "INT8", "W4A16", "W4A16_ASYM", "W8A16", "W4A8", "W4AFP8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK"),
    *("MXFP8", "MXFP8A16", "MXFP4", "MXFP4A16", "NVFP4", "NVFP4A16"),
)

# llm-compressor has these; a did-you-mean would send their users to something else.
NOT_SUPPORTED = re.compile(r"MXFP[468](A8|A16|XFP8)?|W[2-8]A(4|8|16)|UNQUANTIZED")


def preset(name: str) -> QuantizationScheme:
    """The preset called `name`, in whatever case; ConfigError with the nearest one if there is none."""
    known = name.strip().upper()
    if known in PRESETS:
        return PRESETS[known]
    if NOT_SUPPORTED.fullmatch(known):
        problem = f"'{name}' is one of llm-compressor's schemes that quantkit does not support"
    else:
        problem = f"no such scheme: '{name}'{nearest(known, PRESETS)}"
    raise ConfigError(f"{problem}; there are {', '.join(PRESETS)}")
