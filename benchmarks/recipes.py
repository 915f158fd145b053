"""Recipes that are measured against llm-compressor: the same words mean the same in both."""

from __future__ import annotations

from typing import Any

IGNORE = {"targets": "Linear", "ignore": ["lm_head"]}
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "fp8": {"QuantizationModifier": {"scheme": "FP8", **IGNORE}},
    "fp8_dynamic": {"QuantizationModifier": {"scheme": "FP8_DYNAMIC", **IGNORE}},
    "rtn_w8a8": {"QuantizationModifier": {"scheme": "W8A8", **IGNORE}},
    "rtn_w4a16": {"QuantizationModifier": {"scheme": "W4A16", **IGNORE}},
    "gptq": {"GPTQModifier": {"scheme": "W4A16", **IGNORE}},
    "gptq_fp8_dynamic": {"GPTQModifier": {"scheme": "FP8_DYNAMIC", **IGNORE}},
    "gptq_nvfp4a16": {"GPTQModifier": {"scheme": "NVFP4A16", **IGNORE}},
    "rtn_nvfp4a16": {"QuantizationModifier": {"scheme": "NVFP4A16", **IGNORE}},
    **{
        f"rtn_{name.lower()}": {"QuantizationModifier": {"scheme": name, **IGNORE}}
        for name in ("FP8_BLOCK", "MXFP8", "MXFP8A16", "MXFP4", "MXFP4A16", "NVFP4", "W4A8", "W4AFP8", "LLM_INT8")
    },
    "gptq_mxfp4a16": {"GPTQModifier": {"scheme": "MXFP4A16", **IGNORE}},
    "smoothquant_gptq": {
        "SmoothQuantModifier": {"smoothing_strength": 0.8},
        "GPTQModifier": {"scheme": "W8A8", **IGNORE},
    },
    "awq": {"AWQModifier": {}, "QuantizationModifier": {"scheme": "W4A16_ASYM", **IGNORE}},
}
