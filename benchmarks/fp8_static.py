"""`fp8_static` of a random 8-layer Llama (1024 wide, 32 rows of 512 tokens) against llm-compressor, in one run.

usage: python benchmarks/fp8_static.py [--peer-python PATH] [--folder DIR] [--repeat 3]

`--peer-python` is an interpreter with llmcompressor installed; without it only quantkit is measured. quantkit's time
is that of the whole command (start of Python, plan, sweep, write, audit) and, apart, of the calibration and
quantization alone; the peer's is that of oneshot() alone, with model loading and saving left out.
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
    whole, parts, peer = [], [], []
    for _ in range(args.repeat):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", RUN, str(config)], check=True, stdout=subprocess.PIPE, text=True)
        whole.append(time.perf_counter() - started)
        parts.append(json.loads(done.stdout.splitlines()[-1]))
        if args.peer_python:
            target = args.folder / "quantkit-bench-peer"
            script = Path(__file__).with_name("peer_fp8_static.py")
            environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
            done = subprocess.run(
                [args.peer_python, str(script), str(source), str(target), str(rows_file)],
                check=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment,
            )
            peer.append(json.loads(done.stdout.splitlines()[-1])["quantize_s"])
            shutil.rmtree(target, ignore_errors=True)
    print(f"quantkit, whole command   {statistics.median(whole):6.2f} s  ({', '.join(f'{s:.2f}' for s in whole)})")
    for stage in parts[0]:
        print(f"   {stage:<10}             {statistics.median(p[stage] for p in parts):6.2f} s")
    if peer:
        theirs = statistics.median(peer)
        quantize = statistics.median(p["quantize"] for p in parts)
        print(f"llm-compressor oneshot()  {theirs:6.2f} s  ({', '.join(f'{s:.2f}' for s in peer)})")
        ours = statistics.median(whole)
        print(f"ratio {theirs / ours:.2f} (our whole command), {theirs / quantize:.2f} (quantize alone)")


if __name__ == "__main__":
    main()
