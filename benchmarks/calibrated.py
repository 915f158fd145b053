"""Calibrated recipes on a random 8-layer Llama (1024 wide, 32 rows of 512 tokens) against llm-compressor, in one run.

usage: python benchmarks/calibrated.py [--peer-python PATH] [--recipes gptq smoothquant_gptq awq fp8] [--repeat 3]

`--peer-python` is an interpreter with llmcompressor installed; without it only quantkit is measured. Two ratios: of
whole processes (Python's start, imports, loading, quantization, saving; for quantkit its audit, too), and of
quantization alone: the peer's oneshot() with loading and saving left out, against quantkit's engine with its loading
and packing, which are part of it. They take turns, since the machine's speed drifts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from recipes import RECIPES
from synthetic import make_llama

RUN = """
import json, resource, sys
# The peer's timer starts with its model loaded: what Python imports for that is not counted here either.
from transformers import AutoTokenizer, LlamaForCausalLM
from quantkit import engine
from quantkit.config.yaml_file import load_run_config
result = engine.run(load_run_config(sys.argv[1], overwrite=True))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
print(json.dumps(result.seconds | {"peak_rss_mb": peak}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python")
    parser.add_argument("--recipes", nargs="+", default=["gptq", "smoothquant_gptq", "awq", "fp8"], choices=RECIPES)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    source = args.folder / "quantkit-bench-llama"
    if not (source / "config.json").exists():
        make_llama(source, hidden=1024, intermediate=2816, layers=8, heads=16, kv_heads=4)
    generator = random.Random(0)
    rows = [[generator.randrange(3, 2048) for _ in range(512)] for _ in range(32)]
    rows_file, data = args.folder / "rows.json", args.folder / "rows.jsonl"
    rows_file.write_text(json.dumps(rows))
    data.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    for name in args.recipes:
        recipe = json.dumps(RECIPES[name])
        config = args.folder / f"bench_{name}.yaml"
        config.write_text(
            f"model: {{model_path: {source}}}\nglobal: {{save_path: {args.folder}}}\n"
            f"compression: {{recipe: {recipe}}}\n"
            f"dataset: {{data_path: {data}, max_seq_length: 512, num_samples: 32}}\n"
        )
        ours, theirs = [], []
        for _ in range(args.repeat):
            ours.append(measured([sys.executable, "-c", RUN, str(config)], dict(os.environ)))
            if args.peer_python:
                theirs.append(peer(args.peer_python, source, args.folder / "quantkit-bench-peer", rows_file, recipe))
        report(name, ours, theirs)


def measured(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    started = time.perf_counter()
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    whole = time.perf_counter() - started
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures | {"whole": whole}


def peer(python: str, source: Path, target: Path, rows: Path, recipe: str) -> dict[str, Any]:
    script = Path(__file__).with_name("peer_oneshot.py")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    figures = measured([python, str(script), str(source), str(target), str(rows), recipe], environment)
    shutil.rmtree(target, ignore_errors=True)
    return figures | {"quantize": figures["quantize_s"]}


def report(name: str, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    print(name)
    for who, figures in (("quantkit", ours), ("llm-compressor", theirs)):
        for what in ("whole", "quantize", "audit"):
            seconds = [f[what] for f in figures if what in f]
            if seconds:
                listed = ", ".join(f"{s:.2f}" for s in seconds)
                print(f"  {who + ', ' + what:<26} {statistics.median(seconds):7.2f} s  ({listed})")
        if figures:
            print(f"  {who + ', peak RSS':<26} {max(f['peak_rss_mb'] for f in figures):7d} MB")
    if theirs:
        for key, what in (("whole", "whole processes"), ("quantize", "quantization alone")):
            ratio = statistics.median(t[key] / o[key] for o, t in zip(ours, theirs, strict=True))
            print(f"  ratio {ratio:.2f} for {what} (median of the turns)", flush=True)


if __name__ == "__main__":
    main()
