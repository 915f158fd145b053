"""`fp8_static` of a random 8-layer Llama (1024 wide, 32 rows of 512 tokens) against llm-compressor, in one run.

usage: python benchmarks/fp8_static.py [--peer-python PATH] [--folder DIR] [--repeat 3]

`--peer-python` is an interpreter with llmcompressor installed; without it only quantkit is measured. Two ratios: of
whole processes (Python's start, imports, loading, quantization, saving; for quantkit its audit, too), and of
quantization alone: the peer's oneshot() with loading and saving left out, against quantkit's engine with its loading,
which is part of it. They take turns, since the machine's speed drifts.
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

from synthetic import make_llama

RUN = """
import json, sys
# The peer's timer starts with its model loaded: what Python imports for that is not counted here either.
from transformers import AutoTokenizer, LlamaForCausalLM
from quantkit import engine
from quantkit.config.yaml_file import load_run_config
result = engine.run(load_run_config(sys.argv[1], overwrite=True))
print(json.dumps(result.seconds))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    source = args.folder / "quantkit-bench-fp8"
    if not (source / "config.json").exists():
        make_llama(source, hidden=1024, intermediate=2816, layers=8, heads=16, kv_heads=4)
    generator = random.Random(0)
    rows = [[generator.randrange(3, 2048) for _ in range(512)] for _ in range(32)]
    rows_file, data = args.folder / "rows.json", args.folder / "rows.jsonl"
    rows_file.write_text(json.dumps(rows))
    data.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    config = args.folder / "bench_fp8.yaml"
    config.write_text(
        f"model: {{model_path: {source}}}\nglobal: {{save_path: {args.folder}}}\n"
        "compression: {name: PTQ, quantization: {name: fp8_static, ignore_layers: [lm_head]}}\n"
        f"dataset: {{data_path: {data}, max_seq_length: 512, num_samples: 32, batch_size: 8}}\n"
    )
    whole, parts, peer, peer_whole = [], [], [], []
    for _ in range(args.repeat):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", RUN, str(config)], check=True, stdout=subprocess.PIPE, text=True)
        whole.append(time.perf_counter() - started)
        parts.append(json.loads(done.stdout.splitlines()[-1]))
        if args.peer_python:
            target = args.folder / "quantkit-bench-peer"
            script = Path(__file__).with_name("peer_fp8_static.py")
            environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
            started = time.perf_counter()
            done = subprocess.run(
                [args.peer_python, str(script), str(source), str(target), str(rows_file)],
                check=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment,
            )
            peer_whole.append(time.perf_counter() - started)
            peer.append(json.loads(done.stdout.splitlines()[-1])["quantize_s"])
            shutil.rmtree(target, ignore_errors=True)
    quantize = [p["quantize"] for p in parts]
    show("quantkit, whole process", whole)
    show("quantkit, quantize", quantize)
    show("quantkit, audit", [p["audit"] for p in parts])
    if peer:
        show("llm-compressor, whole process", peer_whole)
        show("llm-compressor, oneshot()", peer)
        both = zip(peer_whole, whole, strict=True), zip(peer, quantize, strict=True)
        ratios = [statistics.median(theirs / ours for theirs, ours in pairs) for pairs in both]
        print(
            f"ratio {ratios[0]:.2f} for whole processes, {ratios[1]:.2f} for quantization alone (median of the turns)"
        )


def show(name: str, seconds: list[float]) -> None:
    print(f"{name:<30} {statistics.median(seconds):6.2f} s  ({', '.join(f'{s:.2f}' for s in seconds)})")


if __name__ == "__main__":
    main()
