"""How the benchmarks of CPU ops measure: interleaved rounds, minimum and median, and what they ran on.

Two kinds of memory for results matter more than any kernel. `fresh`: as users call an op, every large result is new
memory that the system clears page by page. `kept`: freed memory stays with the process and is used again, so that
only the work itself is left (`keep_freed_memory`, which cannot be undone in a process).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from quantkit import ops
from quantkit.ops.isa import current_isa


@dataclass
class Timing:
    """Seconds of one call, and the bytes that it has to read and write."""

    name: str
    memory: str
    bytes: int
    minimum: float
    median: float

    @property
    def rate(self) -> float:
        """GB/s of the best round."""
        return self.bytes / self.minimum / 1e9


# What limits torch and oneDNN to about the instructions that QUANTKIT_ISA allows quantkit.
LIMITS: dict[str, tuple[str, ...]] = {"avx512": (), "avx2": ("avx2", "AVX2"), "portable": ("default", "SSE41")}


def limit_isa(isa: str | None) -> None:
    """Start this process again where quantkit, torch and oneDNN are held to `isa`, which they read when they load."""
    if isa is None or os.environ.get("QUANTKIT_ISA") == isa:
        return
    limits = dict(zip(("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA"), LIMITS[isa], strict=False))
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "QUANTKIT_ISA": isa, **limits})


def machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = f"{len(models)} x {models[0]}" if models else cpu
    return {
        "cpu": cpu,
        "isa": current_isa().name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def start(parser: argparse.ArgumentParser, rounds: int) -> tuple[argparse.Namespace, Callable[[], float]]:
    """Add and parse the options that the benchmarks of CPU ops share, set the threads, and print what machine this is.
    Gives the options and the clock that they ask for.
    """
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--cols", type=int, default=14336)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--cpu-time", action="store_true", help="with --threads 1: leave out waiting for a core")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    if args.cpu_time and args.threads != 1:
        parser.error("--cpu-time counts one thread alone: add --threads 1")
    torch.set_num_threads(args.threads)
    ops._load.require("cpu")
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    return args, time.thread_time if args.cpu_time else time.perf_counter


def keep_freed_memory() -> bool:
    """From here on malloc takes memory from its heap alone and gives none back. False where there is no glibc."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except OSError:
        return False
    trim_threshold, mmap_max = -1, -4  # malloc.h
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1))


def measure(
    cases: dict[str, tuple[int, Callable[[int], Any]]],
    memory: str,
    rounds: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time every case once a round, in turn, so that a disturbance hits all of them alike.

    A case is the bytes that it moves and a function of the round: it picks a buffer that is not in a cache any more.
    `clock` may be time.thread_time for one thread on a machine that others use, too: waiting for a core is left out.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for i in range(warmup + rounds):
        for name, (_, function) in cases.items():
            started = clock()
            result = function(i)
            elapsed = clock() - started
            del result
            if i >= warmup:
                seconds[name].append(elapsed)
    return {
        name: Timing(name, memory, moved, min(seconds[name]), statistics.median(seconds[name]))
        for name, (moved, _) in cases.items()
    }


def copies(moved: dict[str, int]) -> dict[str, tuple[int, Callable[[int], Any]]]:
    """Peers that move as many bytes, half read and half written: `copy` into memory that is there, `copy fresh`."""
    largest = max(moved.values()) // 2
    sources = [torch.ones(largest, dtype=torch.uint8) for _ in range(3)]
    target = torch.ones(largest, dtype=torch.uint8)
    cases: dict[str, tuple[int, Callable[[int], Any]]] = {}
    for name, n in moved.items():
        half = n // 2
        cases[f"copy:{name}"] = (n, lambda i, half=half: target[:half].copy_(sources[i % 3][:half]))
        cases[f"copy fresh:{name}"] = (n, lambda i, half=half: sources[i % 3][:half].clone())
    return cases


def report(timings: list[Timing], path: Path | None, **more: Any) -> None:
    """The figures as JSON, if a path is given."""
    if path is not None:
        path.write_text(
            json.dumps({"machine": machine(), "timings": [asdict(t) for t in timings], **more}, indent=2) + "\n"
        )
