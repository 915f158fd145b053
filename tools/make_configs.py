"""Writes configs/: one YAML file for each model and algorithm below. `--check` only compares, as a test does.

The files of a family differ in one line, so they are made from a table and cannot drift apart. Folder and file names
are AngelSlim's: `<family>/<algorithm>/<model>-<size>_<algorithm>.yaml`; `smooth_int8` holds `..._int8_dynamic_smooth`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


class Algorithm(NamedTuple):
    """What stands in the files of one algorithm: a comment, the lines that differ, and how many samples of data are
    needed. `name`: what it is called in the file, if not as the key; `ending`: what the file's name has for it.
    """

    comment: str
    lines: str
    samples: int = 0
    name: str = ""
    ending: str = ""


ALGORITHMS = {
    "int8_dynamic": Algorithm(
        "W8A8: int8 weights per output channel, int8 activations per token at run time. Needs no data.",
        """\
    bits: 8
    quant_method:
      weight: "per-channel"
      activation: "per-token"
""",
    ),
    "fp8_dynamic": Algorithm(
        "FP8 weights with one scale per tensor, FP8 activations scaled at run time. Needs no data.",
        """\
    bits: 8
    quant_method:
      weight: "per-tensor"
      activation: "per-tensor"
""",
    ),
    "fp8_static": Algorithm(
        "FP8 weights and activations with one scale per tensor; those of activations come from calibration data.",
        """\
    bits: 8
    quant_method:
      weight: "per-tensor"
      activation: "per-tensor"
""",
        samples=64,
    ),
    "int4": Algorithm(
        "W4A16: int4 weights rounded to nearest in groups of {group_size}, activations in 16 bit. Needs no data.",
        """\
    bits: 4
    quant_method:
      weight: "per-group"
      group_size: {group_size}
""",
    ),
    "int4_gptq": Algorithm(
        "W4A16 by GPTQ: int4 weights in groups of {group_size}, each column's error taken off those still to come.",
        """\
    bits: 4
    quant_method:
      weight: "per-group"
      group_size: {group_size}
""",
        samples=128,
    ),
    "int4_awq": Algorithm(
        "W4A16 by AWQ: asymmetric int4 weights in groups of {group_size}, smoothed so that outputs change least.",
        """\
    bits: 4
    quant_method:
      weight: "per-group"
      group_size: {group_size}
      zero_point: true
      mse_range: false
""",
        samples=256,
    ),
    "smooth_int8": Algorithm(
        "W8A8 after SmoothQuant: outliers go from activations into weights, then as int8_dynamic.",
        """\
    bits: 8
    quant_method:
      weight: "per-channel"
      activation: "per-token"
    quant_helpers: ["smooth"]
    smooth_alpha: 0.5
""",
        samples=64,
        name="int8_dynamic",
        ending="int8_dynamic_smooth",
    ),
}

# family -> (prefix of the file name, {size in the file name: hub id})
MODELS: dict[str, tuple[str, dict[str, str]]] = {
    "qwen3": (
        "qwen3",
        {
            "0_6b": "Qwen/Qwen3-0.6B",
            "1_7b": "Qwen/Qwen3-1.7B",
            "4b": "Qwen/Qwen3-4B",
            "8b": "Qwen/Qwen3-8B",
            "14b": "Qwen/Qwen3-14B",
            "32b": "Qwen/Qwen3-32B",
            "a3b": "Qwen/Qwen3-30B-A3B",
            "a22b": "Qwen/Qwen3-235B-A22B",
        },
    ),
    "qwen2_5": (
        "qwen2_5",
        {
            f"{size.replace('.', '_').lower()}_instruct": f"Qwen/Qwen2.5-{size}-Instruct"
            for size in ("0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B")
        },
    ),
    "llama3": (
        "llama",
        {
            "3_1_8b_instruct": "meta-llama/Llama-3.1-8B-Instruct",
            "3_2_1b_instruct": "meta-llama/Llama-3.2-1B-Instruct",
            "3_3_70b_instruct": "meta-llama/Llama-3.3-70B-Instruct",
        },
    ),
    "deepseek_r1_distill_qwen": (
        "deepseek_r1_distill_qwen",
        {
            size.replace(".", "_").lower(): f"deepseek-ai/DeepSeek-R1-Distill-Qwen-{size}"
            for size in ("1.5B", "7B", "14B", "32B")
        },
    ),
    "deepseek_v2": ("deepseek_v2", {"lite_chat": "deepseek-ai/DeepSeek-V2-Lite-Chat"}),
    # Published in FP8 by blocks of 128 x 128, which is dequantized as it is read.
    "deepseek_r1": ("deepseek", {"r1": "deepseek-ai/DeepSeek-R1", "v3": "deepseek-ai/DeepSeek-V3-0324"}),
}

# The first layer of DeepSeek-V2-Lite is 10944 wide, which 128 does not divide.
GROUP_SIZES = {"deepseek_v2": 64}

# The one file whose name says low_memory, and the spelling under which documents refer to it.
LOW_MEMORY = "qwen3-a22b_fp8_static_low_memory"
MISSPELLED = "qwen3-a22b_fp8_static_low_memroy"

TEMPLATE = """\
# {comment}
# Made by tools/make_configs.py. For another model of this kind give --model-path, or copy the file.
global:
  save_path: ./output

model:
  model_path: {model}

compression:
  name: quantization
  quantization:
    name: {algorithm}
{lines}    ignore_layers:  # full names, parts of them, or regular expressions after re:
      - "lm_head"
      - "model.embed_tokens"
"""
LOW_MEMORY_LINE = "    low_memory: True  # the least memory: hidden states on disk, and what else makes it less\n"
DATASET = """
dataset:
  name: TextDataset
  data_path: ./examples/data/calibration.jsonl  # better: some hundred texts like those the model will see
  max_seq_length: 4096
  num_samples: {samples}
"""


def files() -> dict[str, str]:
    """Path below configs/ -> content, of every file."""
    result: dict[str, str] = {}
    for family, (prefix, sizes) in MODELS.items():
        for name, algorithm in ALGORITHMS.items():
            for size, model in sizes.items():
                stem = f"{prefix}-{size}_{algorithm.ending or name}"
                lines = algorithm.lines
                low_memory = f"{stem}_low_memory" == LOW_MEMORY
                if low_memory:
                    stem, lines = LOW_MEMORY, LOW_MEMORY_LINE + lines
                text = TEMPLATE.format(
                    comment=algorithm.comment, model=model, algorithm=algorithm.name or name, lines=lines
                )
                text = text.replace("{group_size}", str(GROUP_SIZES.get(family, 128)))
                text += DATASET.format(samples=algorithm.samples) if algorithm.samples else ""
                result[f"{family}/{name}/{stem}.yaml"] = text
                if low_memory:
                    comment = f"# The same as {LOW_MEMORY}.yaml, under a name that documents misspell.\n"
                    result[f"{family}/{name}/{MISSPELLED}.yaml"] = comment + text
    return result


def differences(folder: Path = CONFIGS) -> list[str]:
    """What is missing, different or not from here in `folder`."""
    wanted = files()
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*.yaml")}
    changed = [name for name in there & set(wanted) if (folder / name).read_text(encoding="utf-8") != wanted[name]]
    return [
        *(f"missing: {name}" for name in sorted(set(wanted) - there)),
        *(f"not made here: {name}" for name in sorted(there - set(wanted))),
        *(f"different: {name}" for name in sorted(changed)),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if something differs")
    if not parser.parse_args().check:
        for name, text in files().items():
            (CONFIGS / name).parent.mkdir(parents=True, exist_ok=True)
            (CONFIGS / name).write_text(text, encoding="utf-8")
    found = differences()
    print("\n".join(found) or f"{len(files())} files in {CONFIGS.name}/ are as they should be")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
