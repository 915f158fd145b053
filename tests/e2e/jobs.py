"""Quantizing an embedded model by YAML, as users do, for the end-to-end tests."""

from __future__ import annotations

from pathlib import Path

from quantkit import engine
from quantkit.config.yaml_file import load_run_config

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
}


def quantize(model: str, scheme: str, folder: Path, *overrides: str) -> Path:
    """Run the job for SCHEMES[scheme] on `examples/models/<model>`; gives back the audited output."""
    yaml = folder / f"{scheme}.yaml"
    yaml.write_text(
        f"""
global:
  save_path: {folder}
model:
  model_path: {EXAMPLES / "models" / model}
compression:
  name: PTQ
  quantization:
    {SCHEMES[scheme]}
    ignore_layers: ["lm_head"]
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
