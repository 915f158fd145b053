"""What the benchmarks of CUDA ops share: time on the device, bytes, rates of the device itself, results as JSON.

`--dry-run` runs everything once on the CPU with small shapes and says nothing of speed: it shows that the script runs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import quantkit.ops as ops


def size(*tensors: Any) -> int:
    """Bytes."""
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--dry-run", action="store_true", help="everything once, on the CPU, small: no figures")


class Device:
    """The current CUDA device, or the CPU as its stand-in."""

    def __init__(self, dry: bool) -> None:
        self.dry, self.torch = dry, torch.device("cpu" if dry else "cuda")
        if dry:
            self.name, self.capability, self._flush = "dry run on the CPU: no figure means anything", (0, 0), None
            return
        ops._load.require("cuda")
        self.name, self.capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        self._flush = torch.empty(2 * cache, dtype=torch.uint8, device=self.torch)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, device=self.torch).to(dtype)

    def seconds(self, call: Callable[[], Any], runs: int = 30) -> float:
        """Median time on the device, the L2 cache overwritten before each run."""
        call()
        if self._flush is None:
            return 1e-3
        times = []
        for _ in range(runs):
            self._flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return sorted(times)[runs // 2]

    def copy_rate(self, count: int = 1 << 28) -> float:
        """Bytes read and written a second, of so many copied."""
        source = torch.empty(1 << 16 if self.dry else count, dtype=torch.uint8, device=self.torch)
        target = torch.empty_like(source)
        return 2 * size(source) / self.seconds(lambda: target.copy_(source))

    def product_rate(self, dtype: torch.dtype) -> float:
        """Operations a second of torch's matrix product, without TF32."""
        torch.backends.cuda.matmul.allow_tf32 = False
        n = 64 if self.dry else 8192
        a, b = self.randn(n, n, dtype=dtype), self.randn(n, n, dtype=dtype)
        return 2.0 * n**3 / self.seconds(lambda: a @ b, 10)

    def save(self, path: Path | None, results: Any, **about: Any) -> None:
        if path is not None:
            known = {"device": self.name, "torch": torch.__version__, "cuda": torch.version.cuda}
            path.write_text(json.dumps({**known, **about, "results": results}, indent=1) + "\n")
