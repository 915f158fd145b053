"""Peak memory of calibrated runs: over depth, within a budget, and with experts in groups.

`python benchmarks/memory.py` makes random checkpoints in --folder, runs `quantkit run` on each in a process of its own,
and prints the peak of its resident set (VmHWM, mapped files included) beside what the plan predicts, and what it read
from disk, whose cache is emptied of the checkpoint first: from the plan until all is written, libraries that the system
had put out of its cache among them, and by the audit, what it had put out of source and output since. With a budget the
process may not allocate more than that either (RLIMIT_DATA: all that is private and can be written to), but for what is
reserved and never touched.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synthetic import make_llama

CHILD = """
import sys, time
from pathlib import Path
from quantkit.config.yaml_file import load_run_config
from quantkit import engine
import torch, transformers
config = load_run_config(sys.argv[1])
def read():
    return int(dict(line.split(":") for line in Path("/proc/self/io").read_text().splitlines())["read_bytes"])
reads = []
usual = engine.audit
def audit(*args, **kwargs):
    reads.append(read())
    return usual(*args, **kwargs)
engine.audit = audit
def show(plan):
    reads.append(read())
    means = plan.means
    print("PLAN", plan.estimate.memory_bytes, plan.checkpoint.total_bytes, means.forwards, means.describe(), flush=True)
started = time.perf_counter()
result = engine.run(config, show=show, progress=False)
assert result.audit.ok
took = time.perf_counter() - started
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print("DONE", int(status["VmHWM"].split()[0]) * 1024, took, reads[1] - reads[0], read() - reads[1])
"""
TEXT = Path(__file__).resolve().parent.parent / "examples" / "data" / "calibration.jsonl"
RECIPES = {
    "gptq": "{GPTQModifier: {scheme: W4A16}}",
    "smooth": "{SmoothQuantModifier: {}, GPTQModifier: {scheme: W8A8}}",
    "awq": "{AWQModifier: {scheme: W4A16_ASYM}}",
    "static": "{QuantizationModifier: {scheme: FP8}}",
}
# Stacks of threads, data of libraries, gaps of allocators: memory that a process has and does not touch.
RESERVED = 320 << 20
# 22 MB a layer, and 403 MB a layer in 64 experts.
DENSE: dict[str, Any] = {"hidden": 1024, "intermediate": 2816, "heads": 16, "kv_heads": 4}
EXPERTS: dict[str, Any] = {"hidden": 1024, "intermediate": 1024, "heads": 16, "kv_heads": 4, "experts": 64}


@dataclass(frozen=True)
class Run:
    """Bytes and seconds; `means`: what the plan did to keep to its memory; `read`: from disk, and by the audit."""

    peak: int
    predicted: int
    source: int
    means: str
    seconds: float
    read: int
    again: int


def run(model: Path, recipe: str, rows: tuple[int, int], settings: dict[str, Any], limit: int | None = None) -> Run:
    """`quantkit run` with rows = (how many, tokens each), in a process that may not allocate much more than `limit`."""
    folder = model.parent
    (folder / "rows.txt").write_text(_rows(*rows))
    config = {
        "global": {"save_path": str(folder / "out"), "overwrite": True, **settings},
        "model": {"model_path": str(model)},
        "dataset": {"data_path": str(folder / "rows.txt"), "num_samples": rows[0], "max_seq_length": rows[1]},
        "compression": {"recipe": None},
    }
    path = folder / "job.yaml"
    path.write_text(json.dumps(config).replace("null", recipe))

    for file in model.glob("*.safetensors"):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def confine() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit + RESERVED, limit + RESERVED))

    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(path)], capture_output=True, text=True, preexec_fn=confine, check=False
    )
    if child.returncode:
        raise SystemExit(f"{path}: {child.stderr[-3000:]}")
    shutil.rmtree(folder / "out")
    lines = {line.split()[0]: line.split()[1:] for line in child.stdout.splitlines() if line}
    predicted, source, forwards, *means = lines["PLAN"]
    described = ", ".join(filter(None, [f"forwards {forwards}", " ".join(means)]))
    peak, seconds, read, again = lines["DONE"]
    return Run(int(peak), int(predicted), int(source), described, float(seconds), int(read), int(again))


def _rows(count: int, length: int) -> str:
    """Text of `count` rows, each of at least `length` tokens."""
    text = " ".join(TEXT.read_text().split())
    each = 8 * length
    text *= 1 + (count + 1) * each // len(text)
    return "\n".join(text[i * each : (i + 1) * each] for i in range(count)) + "\n"


def _model(folder: Path, name: str, layers: int, shape: dict[str, Any]) -> Path:
    path = folder / f"{name}-{layers}"
    if not (path / "model.safetensors.index.json").exists():
        make_llama(path, layers=layers, **shape)
    return path


def _line(what: str, found: Run) -> str:
    source, peak, predicted = (x / 1e6 for x in (found.source, found.peak, found.predicted))
    error = 100 * (predicted / peak - 1)
    read = f"{found.read / 1e6:.0f}, {found.again / 1e6:.0f}"
    sizes = f"{source:.0f} | {read} | {peak:.0f} | {predicted:.0f} ({error:+.0f} %)"
    return f"| {what} | {sizes} | {found.means} | {found.seconds:.0f} |"


HEAD = "| run | source MB | read, by audit MB | peak MB | predicted MB | means | s |\n|---|---|---|---|---|---|---|"


def depth(folder: Path, recipes: list[str], rounds: int) -> Iterator[str]:
    """The same model with 12 and with 24 layers, in turns."""
    for recipe in recipes:
        for settings in ({}, {"memory_budget": "750MB"}):
            peaks: dict[int, list[int]] = {12: [], 24: []}
            for _ in range(rounds):
                for layers, seen in peaks.items():
                    found = run(_model(folder, "llama", layers, DENSE), RECIPES[recipe], (32, 512), settings)
                    seen.append(found.peak)
                    budget = ", budget 750 MB" if settings else ""
                    yield _line(f"{recipe}, {layers} layers{budget}", found)
            shallow, deep = (statistics.median(seen) for seen in peaks.values())
            yield f"  24 layers against 12, medians: {100 * (deep / shallow - 1):+.1f} %"


def budget(folder: Path, recipes: list[str], rounds: int) -> Iterator[str]:
    """A dense model three times as large as the budget."""
    model = _model(folder, "llama", 96, DENSE)
    for recipe in recipes:
        yield _line(
            f"{recipe}, budget 720 MB", run(model, RECIPES[recipe], (8, 512), {"memory_budget": "720MB"}, 720_000_000)
        )


def experts(folder: Path, recipes: list[str], rounds: int) -> Iterator[str]:
    """64 experts a layer, a layer of which with what is known of its inputs is larger than the budget."""
    model = _model(folder, "experts", 6, EXPERTS)
    for recipe in recipes:
        yield _line(
            f"{recipe}, budget 750 MB", run(model, RECIPES[recipe], (8, 512), {"memory_budget": "750MB"}, 750_000_000)
        )


def main() -> None:
    """See the module."""
    parts = {"depth": depth, "budget": budget, "experts": experts}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(parts), choices=list(parts))
    parser.add_argument("--folder", type=Path, default=Path("/tmp/quantkit-memory"))
    parser.add_argument("--recipes", nargs="+", default=["gptq", "static"], choices=list(RECIPES))
    parser.add_argument("--rounds", type=int, default=1, help="of 12 and 24 layers")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints there")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    print(HEAD)
    for part in arguments.parts:
        for line in parts[part](arguments.folder, arguments.recipes, arguments.rounds):
            print(line, flush=True)
    if not arguments.keep:
        shutil.rmtree(arguments.folder)


if __name__ == "__main__":
    main()
