"""Quantizing an embedded model by YAML, as users do, for the end-to-end tests."""

from __future__ import annotations

from pathlib import Path

from quantkit import engine
from quantkit.config.yaml_file import load_run_config
from quantkit.conformance import Verdict

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

# name -> the `quantization` section; "static" ones need data
SCHEMES = {
    "int8_dynamic": "name: int8_dynamic",
    "fp8_dynamic": "name: fp8_dynamic",
    "fp8_static": "name: fp8_static",
    "int8_static": "name: int8_static",
    "int4": "name: int4",
    "int8": "name: int8",
    "W8A8": "scheme: W8A8",
    "FP8_DYNAMIC": "scheme: FP8_DYNAMIC",
    "FP8_BLOCK": "scheme: FP8_BLOCK",
    "FP8": "scheme: FP8",
    "W4A16": "scheme: W4A16",
    "W4A16_ASYM": "scheme: W4A16_ASYM",
    "W8A16": "scheme: W8A16",
    "W8A8_STATIC_ASYM": "scheme: W8A8_STATIC_ASYM",
    "W8A8_ASYM": "scheme: W8A8_ASYM",
    "W4A16_CHANNEL_ASYM": "scheme: W4A16_CHANNEL_ASYM",
    "W8A16_ASYM": "scheme: W8A16_ASYM",
    "W4AFP8": "scheme: W4AFP8",
    "MXFP8": "scheme: MXFP8",
    "MXFP8A16": "scheme: MXFP8A16",
    "MXFP4": "scheme: MXFP4",
    "MXFP4A16": "scheme: MXFP4A16",
    "NVFP4": "scheme: NVFP4",
    "NVFP4A16": "scheme: NVFP4A16",
    "W4A8": "scheme: W4A8",
    "W4A16_CHANNEL": "scheme: W4A16_CHANNEL",
    "W8A16_CHANNEL": "scheme: W8A16_CHANNEL",
    "W8A16_CHANNEL_ASYM": "scheme: W8A16_CHANNEL_ASYM",
    "W8A8_STATIC": "scheme: W8A8_STATIC",
    "FP8_PER_TENSOR_DYNAMIC": "scheme: FP8_PER_TENSOR_DYNAMIC",
}

# name -> modifiers of a recipe with several schemes, or with a KV cache
RECIPES = {
    "attention W8A8, mlp W4A16": "{QuantizationModifier: {scheme: {W8A8: ['re:.*attn.*'], W4A16: ['re:.*mlp.*']}}}",
    "fp8 and int4": "{QuantizationModifier: {scheme: {FP8_DYNAMIC: ['re:.*down_proj'], W4A16_ASYM: [Linear]}}}",
    "one layer in W8A16": "{QuantizationModifier: {scheme: {W8A16: ['re:.*layers.1.mlp'], W8A8: [Linear]}}}",
    "groups in order": "{GPTQModifier: {scheme: W4A16_ASYM, actorder: group}}",
    "smoothed": "{SmoothQuantModifier: {smoothing_strength: 0.8}, GPTQModifier: {scheme: W8A8}}",
    "negative scales": "{GPTQModifier: {scheme: W4A16}}",
    "FP8 cache": "{QuantizationModifier: {kv_cache_scheme: fp8}}",
    "FP8 cache per head": "{QuantizationModifier: {scheme: FP8_DYNAMIC, kv_cache_scheme: "
    "{num_bits: 8, type: float, strategy: attn_head}}}",
    "int8 cache": "{QuantizationModifier: {scheme: W8A8_STATIC, kv_cache_scheme: int8}}",
}


def quantize(model: str, scheme: str, folder: Path, *overrides: str) -> Path:
    """Run the job for SCHEMES[scheme] on `examples/models/<model>`; gives back the audited output."""
    what = f'quantization: {{{SCHEMES[scheme]}, ignore_layers: ["lm_head"]}}'
    return _run(model, scheme, what, folder, *overrides)


def quantize_by(model: str, modifiers: str, folder: Path, *overrides: str) -> Path:
    """Run a recipe, its modifiers as a YAML mapping, on `examples/models/<model>`; gives back the audited output."""
    return _run(model, "recipe", f"recipe: {{quant_stage: {{quant_modifiers: {modifiers}}}}}", folder, *overrides)


def refused_parts(verdict: Verdict) -> tuple[bool, bool]:
    """Whether a client refuses any Linear outside of experts, and any within."""
    refused = {f.where for f in verdict.findings if f.kind in ("refused", "wrong")}
    return any(".experts." not in where for where in refused), any(".experts." in where for where in refused)


def _run(model: str, name: str, what: str, folder: Path, *overrides: str) -> Path:
    yaml = folder / f"{name}.yaml"
    yaml.write_text(
        f"""
global:
  save_path: {folder}
model:
  model_path: {EXAMPLES / "models" / model}
compression:
  name: PTQ
  {what}
dataset:
  data_path: {EXAMPLES / "data" / "calibration.jsonl"}
  max_seq_length: 256
  num_samples: 32
  batch_size: 8
"""
    )
    result = engine.run(load_run_config(yaml, overrides=overrides))
    assert result.audit.ok, result.audit.render()
    return result.output
