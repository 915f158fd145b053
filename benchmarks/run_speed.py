"""`quantkit run` (int8_dynamic, audit included) on a synthetic checkpoint, against `cp` + fsync of that checkpoint.

usage: python benchmarks/run_speed.py [--gb 4] [--folder DIR] [--repeat 3] [--algorithm int8_dynamic]

Both read the source from a warm page cache and end when their bytes are on disk; they take turns. Also the peak
resident set of the run above that of `import quantkit`, beside twice the largest tensor + 300 MB.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from synthetic import make_llama

LARGEST = 14336 * 4096 * 2  # bytes of an MLP weight; the embedding is kept smaller


# VmHWM is of this program alone; a child's ru_maxrss would remember the parent it was forked from.
CHILD = """
import sys
import quantkit
status = 0
if sys.argv[1:]:
    from quantkit.cli import main
    status = main(sys.argv[1:])
print("VmHWM", next(l.split()[1] for l in open("/proc/self/status") if l.startswith("VmHWM")))
from quantkit.startup import leave  # as the command ends
leave(status)
"""


def child(*arguments: str) -> tuple[float, int]:
    """Wall seconds and peak resident bytes of `quantkit ARGUMENTS`; without arguments of `import quantkit` alone."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return time.perf_counter() - started, int(done.stdout.split()[-1]) * 1024


def copy(source: Path, target: Path) -> float:
    """Seconds of cp -r and of fsync on every file."""
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    for path in target.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=4.0)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--algorithm", default="int8_dynamic")
    args = parser.parse_args()
    layers = max(round(args.gb * 1e9 / 436e6), 1)
    source = args.folder / f"quantkit-bench-{layers}"
    if not (source / "config.json").exists():
        make_llama(source, hidden=4096, intermediate=14336, layers=layers, heads=32, kv_heads=8, vocab=8192)
    nbytes = sum(p.stat().st_size for p in source.iterdir())
    for path in source.glob("*.safetensors"):  # warm
        subprocess.run(["cat", str(path)], stdout=subprocess.DEVNULL, check=True)
    config = args.folder / "bench.yaml"
    config.write_text(
        f"model: {{model_path: {source}}}\nglobal: {{save_path: {args.folder}}}\n"
        f"compression: {{name: PTQ, quantization: {{name: {args.algorithm}, ignore_layers: [lm_head]}}}}\n"
    )
    copied, output = args.folder / "quantkit-bench-cp", args.folder / config.stem
    _, base = child()
    copies, runs, peaks = [], [], []
    for _ in range(args.repeat):
        shutil.rmtree(copied, ignore_errors=True)
        shutil.rmtree(output, ignore_errors=True)
        copies.append(copy(source, copied))
        shutil.rmtree(copied)
        seconds, peak = child("run", "-c", str(config))
        runs.append(seconds)
        peaks.append(peak - base)
    shutil.rmtree(output, ignore_errors=True)
    cp, run = statistics.median(copies), statistics.median(runs)
    print(f"{args.algorithm}, {nbytes / 1e9:.2f} GB in {layers} layers, median of {args.repeat}")
    print(f"cp + fsync      {cp:6.2f} s  ({', '.join(f'{s:.2f}' for s in copies)})")
    print(f"quantkit run    {run:6.2f} s  ({', '.join(f'{s:.2f}' for s in runs)})  ratio {run / cp:.2f}")
    peak, limit = max(peaks) / 1e6, 2 * LARGEST / 1e6 + 300
    print(f"peak RSS above import quantkit {peak:.0f} MB; 2 x largest tensor + 300 MB = {limit:.0f} MB")


if __name__ == "__main__":
    main()
