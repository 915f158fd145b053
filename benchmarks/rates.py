"""What this machine does in a second, as `quantkit plan` counts it, and how well that foretells whole runs.

usage: python benchmarks/rates.py [--threads 2] [--rounds 5] [--folder DIR]
       python benchmarks/rates.py --check [JOB ...] [--threads 2] [--folder DIR]

Without --check: the `Rates` of `estimate_time.CPU`, each a median of rounds in turns, with the slowest and the fastest.
With --check: whole processes of `quantkit` on random models, each beside what the plan foretells from the table in
`estimate_time.py` (not from what was just measured).
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench import machine
from recipes import RECIPES
from synthetic import make_llama

from quantkit import engine, ops
from quantkit.calibration.batches import batches
from quantkit.calibration.statistics import Wants
from quantkit.calibration.sweep import sweep
from quantkit.checkpoint.reader import Checkpoint
from quantkit.config.recipe_file import recipe_of
from quantkit.config.run_config import CompressionConfig, DatasetConfig, GlobalConfig, ModelConfig, RunConfig
from quantkit.config.schemes import QuantizationArgs
from quantkit.estimate_time import CPU, seconds, total, work_of
from quantkit.formats.source import WeightSource
from quantkit.models.skeleton import Skeleton
from quantkit.modifiers.gptq import SEARCH
from quantkit.modifiers.rtn import quantize_weight

INT4 = QuantizationArgs(4, "int", True, "group", 128)
GB = 1 << 30
EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "models"
LLAMA: dict[str, Any] = {"hidden": 2048, "intermediate": 5632, "layers": 3, "heads": 16, "kv_heads": 8}
MOE: dict[str, Any] = {"hidden": 1024, "intermediate": 512, "layers": 3, "heads": 16, "kv_heads": 4, "experts": 32}
JOBS = {
    "rtn_w4a16": (LLAMA, "rtn_w4a16"),
    "fp8_dynamic": (LLAMA, "fp8_dynamic"),
    "fp8": (LLAMA, "fp8"),
    "gptq": (LLAMA, "gptq"),
    "smoothquant_gptq": (LLAMA, "smoothquant_gptq"),
    "awq": (LLAMA, "awq"),
    "moe_gptq": (MOE, "gptq"),
    "moe_fp8": (MOE, "fp8"),
}
ROWS, LENGTH = 32, 512

CHILD = """
import json, random, sys, torch
from quantkit import engine
sys.path.insert(0, sys.argv[1])
from rates import LENGTH, ROWS, RECIPES, job
from pathlib import Path
torch.set_num_threads(int(sys.argv[2]))
draw = random.Random(0)
rows = [[draw.randrange(3, int(sys.argv[6])) for _ in range(LENGTH)] for _ in range(ROWS)]
config = job(Path(sys.argv[3]), Path(sys.argv[4]), RECIPES[sys.argv[5]])
result = engine.run(config, rows=rows if config.recipe.needs_data else None, progress=False)
assert result.audit.ok
print(json.dumps(result.seconds))
"""


class Nothing:
    """A visitor that wants the ranges of the last layer's last input, so that the layer runs to its end."""

    pools_below, together = 0, False
    caches = ()

    def __init__(self, name: str) -> None:
        self.statistics: dict[str, Wants] = {}
        self.ranges = {name: Wants()}

    def across(self, index: int) -> None:
        return None

    def norms(self, index: int) -> dict[str, Any]:
        return {}

    def prepare(self, layer: Any) -> None:
        pass

    finish = observe = lambda self, *_: None


def forward(folder: Path) -> tuple[float, Callable[[], Any]]:
    """One layer of an 8B Llama, with attention, norms and the packing of its weights."""
    source = make_llama(folder / "layer", hidden=4096, intermediate=14336, layers=1, heads=32, kv_heads=8)
    rows = [[random.randrange(3, 2048) for _ in range(512)] for _ in range(16)]
    checkpoint = Checkpoint(source)
    skeleton = Skeleton(source, checkpoint.tensors)
    visitor: Any = Nothing("model.layers.0.mlp.down_proj")
    area = sum(i.shape[0] * i.shape[1] for n, i in checkpoint.tensors.items() if len(i.shape) == 2 and "layers" in n)
    return len(rows) * 512 * (area + 512 * 4096), lambda: sweep(
        skeleton, WeightSource(checkpoint), batches(rows), visitor
    )


def cases(folder: Path) -> dict[str, tuple[float, Callable[[], Any]]]:
    """What is done, in the units of `Work`, and what does it."""
    x = torch.randn(4096, 4096).bfloat16()
    gram = torch.zeros(4096, 4096)
    channels = torch.stack((torch.full((4096,), torch.inf), torch.full((4096,), -torch.inf), torch.zeros(4096)))
    ops.gram_accumulate(x, gram, channels=channels)
    factor, _ = ops.gptq_factor(gram, 0.01)
    rows, part = torch.randn(2048, 4096), torch.randn(256, 4096)
    search_range, search_steps = SEARCH[True]
    grid = torch.rand(20, 4096) + 0.5
    # 24 experts with 64 tokens each: none of their weights is in a cache.
    experts, few = [torch.randn(1536, 4096).bfloat16() for _ in range(24)], torch.randn(64, 4096).bfloat16()
    plain = torch.randn(14336, 4096).bfloat16()
    ordinary = gram.clone()
    return {
        "forward": forward(folder),
        "experts": (24 * 64 * 1536 * 4096.0, lambda: [torch.nn.functional.linear(few, w) for w in experts]),
        "gram": (4096.0**3, lambda: ops.gram_accumulate(x, gram.zero_(), channels=channels)),
        "factor": (4096.0**3, lambda: ops.gptq_factor(ordinary, 0.01)),
        "sweep": (
            2048 * 4096.0**2,
            lambda: ops.gptq_sweep(
                rows,
                factor,
                q_min=-8,
                q_max=7,
                divisor=7.5,
                group_size=128,
                search_range=search_range,
                search_steps=search_steps,
                signs=True,
            ),
        ),
        "search": (
            20 * 256 * 4096.0**2,
            lambda: ops.awq_search(
                part, ordinary, grid, group_size=128, q_min=-8, q_max=7, symmetric=True, divisor=7.5
            ),
        ),
        "round": (
            float(plain.numel()),
            lambda: quantize_weight("w", plain, INT4, scale_dtype=torch.bfloat16, pack=True),
        ),
    }


def disk(folder: Path) -> dict[str, float]:
    """Bytes a second written with fsync, and read back once the page cache has let go of them."""
    path, data = folder / "bytes", os.urandom(64 << 20)
    started = time.perf_counter()
    with open(path, "wb") as file:
        for _ in range(GB // len(data)):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
        write = GB / (time.perf_counter() - started)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    started = time.perf_counter()
    with open(path, "rb", buffering=0) as raw:
        while raw.read(16 << 20):
            pass
    read = GB / (time.perf_counter() - started)
    path.unlink()
    return {"read": read, "write": write}


def job(model: Path, folder: Path, recipe: dict[str, Any]) -> RunConfig:
    return RunConfig(
        GlobalConfig(save_path=str(folder), overwrite=True),
        ModelConfig(str(model)),
        CompressionConfig(recipe=recipe_of(recipe)),
        DatasetConfig(data_path="rows", max_seq_length=LENGTH, num_samples=ROWS),
        source=folder,
        stem="out",
    )


def process(model: Path, folder: Path, recipe: str, threads: int) -> tuple[float, dict[str, float]]:
    """Seconds of a whole process, and of its stages."""
    vocab = json.loads((model / "config.json").read_text())["vocab_size"]
    here = str(Path(__file__).resolve().parent)
    command = [sys.executable, "-c", CHILD, here, str(threads), str(model), str(folder), recipe, str(vocab)]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return time.perf_counter() - started, json.loads(done.stdout.splitlines()[-1])


def audited(folder: Path) -> float:
    """Bytes a second of source and output that the audit goes through."""
    model = make_llama(folder / "two", **LLAMA)
    result = engine.run(job(model, folder, RECIPES["rtn_w4a16"]), progress=False)
    nbytes = sum(path.stat().st_size for place in (model, result.output) for path in place.glob("*.safetensors"))
    return nbytes / result.seconds["audit"]


def linears(folder: Path) -> float:
    """Linears a second of the embedded model with experts, which are so small that all else is what they cost."""
    draw = random.Random(0)
    rows = [[draw.randrange(3, 500) for _ in range(64)] for _ in range(4)]
    result = engine.run(job(EXAMPLES / "tiny-moe", folder, RECIPES["gptq"]), rows=rows, progress=False)
    assert result.report is not None
    return len(result.report.modules) / result.seconds["quantize"]


def measure(folder: Path, rounds: int, threads: int) -> dict[str, list[float]]:
    """Every rate, once a round."""
    todo = cases(folder)
    found: dict[str, list[float]] = {}
    linears(folder)  # whatever is imported is, now
    for number in range(rounds + 1):
        once: dict[str, float] = {}
        for name, (work, function) in todo.items():
            started = time.perf_counter()
            function()
            once[name] = work / (time.perf_counter() - started)
        once |= {"linears": linears(folder), "audit": audited(folder), **disk(folder)}
        if number:  # the first warms up
            for name, rate in once.items():
                found.setdefault(name, []).append(rate)
    for name, recipe in (("start", "fp8_dynamic"), ("calibrating", "fp8")):
        for _ in range(3):
            # The tiny model's own work is a tenth of a second of it.
            taken, _stages = process(EXAMPLES / "tiny-llama", folder, recipe, threads)
            found.setdefault(name, []).append(taken)
    return found


def check(folder: Path, names: list[str], threads: int) -> None:
    """What the plan foretells beside what happens."""
    models: dict[int, Path] = {}
    for name in names:
        shape, recipe = JOBS[name]
        if id(shape) not in models:
            models[id(shape)] = make_llama(folder / f"model{len(models)}", **shape)
        model = models[id(shape)]
        with engine.open_plan(job(model, folder, RECIPES[recipe])) as plan:
            spent = seconds(work_of(plan), CPU, cores=threads)
        taken, stages = process(model, folder, recipe, threads)
        told = ", ".join(f"{key} {value:.2f}" for key, value in spent.items() if value > 0.05)
        print(
            f"{name:<17} took {taken:6.2f} s ({', '.join(f'{k} {v:.2f}' for k, v in stages.items())}); "
            f"foretold {total(spent):6.2f} s ({told}); ratio {total(spent) / taken:.2f}",
            flush=True,
        )
        shutil.rmtree(folder / "out", ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--check", nargs="*", choices=list(JOBS), metavar="JOB")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(", ".join(f"{key} {value}" for key, value in machine().items()), flush=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        if args.check is not None:
            check(Path(folder), args.check or list(JOBS), args.threads)
            return
        found = measure(Path(folder), args.rounds, args.threads)
    for name, rates in found.items():
        print(f"{name:<12} median {statistics.median(rates):.3g}, from {min(rates):.3g} to {max(rates):.3g}")


if __name__ == "__main__":
    main()
