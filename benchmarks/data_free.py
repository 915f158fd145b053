"""`quantkit run` without data against `cp` + fsync of the checkpoint and llm-compressor's model_free_ptq.

usage: python benchmarks/data_free.py [--gb 1.46] [--folder DIR] [--repeat 3] [--schemes FP8_DYNAMIC W8A8 W4A16]
       [--peer-python PATH] [--peer-workers 1] [--cold]

Whole processes, in turns, on a random bf16 Llama: start and imports, quantizing, fsync, and ours with its audit, which
reads everything again; the peer neither syncs nor audits. The source is in the page cache; with `--cold` it is put out
of it before each turn. Memory is the peak resident set of the process. The split is what `quantkit run` prints, and
"start" the rest of the wall time: Python, and imports.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from run_speed import CHILD, copy
from synthetic import make_llama

PEER = """
import sys
from llmcompressor import model_free_ptq
source, target, scheme, workers = sys.argv[1:]
model_free_ptq(source, target, scheme=scheme, ignore=["lm_head", "re:.*embed_tokens"], max_workers=int(workers))
print("VmHWM", next(l.split()[1] for l in open("/proc/self/status") if l.startswith("VmHWM")))
"""


@dataclass
class Series:
    """What the turns of one contestant gave."""

    seconds: list[float] = field(default_factory=list)
    peak: int = 0
    split: dict[str, list[float]] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def settle(evicted: Path | None) -> None:
    """What an earlier turn left to the disk, deleted files too, is no part of the next one."""
    os.sync()
    time.sleep(1)
    for path in () if evicted is None else evicted.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def process(series: Series, *command: str) -> None:
    """Run it, and note its time, its peak and what it says of its stages."""
    started = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    series.seconds.append(time.perf_counter() - started)
    series.peak = max(series.peak, int(done.stdout.split()[-1]) * 1024)
    if told := re.search(r"\((plan .*)\)", done.stdout):
        stages = {name: float(value) for name, value in re.findall(r"(\w+) ([\d.]+) s", told[1])}
        stages["start"] = series.seconds[-1] - sum(stages.values())
        for name, value in stages.items():
            series.split.setdefault(name, []).append(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.46)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--schemes", nargs="+", default=["FP8_DYNAMIC", "W8A8", "W4A16"])
    parser.add_argument("--peer-python", help="python of an environment with llm-compressor")
    parser.add_argument("--peer-workers", default="1")
    parser.add_argument("--cold", action="store_true")
    args = parser.parse_args()
    layers = max(round(args.gb * 1e9 / 436e6), 1)
    source = args.folder / f"quantkit-bench-{layers}"
    if not (source / "config.json").exists():
        make_llama(source, hidden=4096, intermediate=14336, layers=layers, heads=32, kv_heads=8, vocab=8192)
    for path in source.glob("*.safetensors"):  # warm
        subprocess.run(["cat", str(path)], stdout=subprocess.DEVNULL, check=True)
    nbytes = sum(p.stat().st_size for p in source.iterdir())
    found: dict[str, Series] = {"cp + fsync": Series()}
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="quantkit-data-free-") as work:
        target = Path(work) / "output"
        for _ in range(args.repeat):
            settle(source if args.cold else None)
            found["cp + fsync"].seconds.append(copy(source, target))
            shutil.rmtree(target)
            for scheme in args.schemes:
                config = Path(work) / "output.yaml"
                config.write_text(
                    f"model: {{model_path: {source}}}\nglobal: {{save_path: {work}}}\n"
                    f"compression: {{name: PTQ, quantization: {{scheme: {scheme}, ignore_layers: [lm_head]}}}}\n"
                )
                contestants = {f"quantkit {scheme}": (sys.executable, "-c", CHILD, "run", "-c", str(config))}
                if args.peer_python:
                    peer = (args.peer_python, "-c", PEER, str(source), str(target), scheme, args.peer_workers)
                    contestants[f"model_free_ptq {scheme}"] = peer
                for name, command in contestants.items():
                    settle(source if args.cold else None)
                    process(found.setdefault(name, Series()), *command)
                    shutil.rmtree(target)
    print(f"{nbytes / 1e9:.2f} GB in {layers} layers, {'cold' if args.cold else 'warm'}, median of {args.repeat}")
    base = found["cp + fsync"].median
    for name, series in found.items():
        turns = ", ".join(f"{s:.2f}" for s in series.seconds)
        line = f"{name:28}{series.median:7.2f} s  ({turns})  {series.median / base:5.2f} x cp"
        line += f", peak RSS {series.peak / 1e6:.0f} MB" if series.peak else ""
        ours = found.get(name.replace("model_free_ptq", "quantkit"))
        if ours is not None and ours is not series:
            line += (
                f"; quantkit {series.median / ours.median:.1f} x faster, {ours.peak / series.peak:.0%} of its memory"
            )
        print(line)
        if series.split:
            print("    " + ", ".join(f"{key} {statistics.median(value):.2f}" for key, value in series.split.items()))


if __name__ == "__main__":
    main()
