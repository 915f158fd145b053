"""GEMMs of bf16 x with int4, int8 and packed bf16 weights, against torch: GB/s, GFLOP/s, shares of the peaks, ratios.

usage: python benchmarks/wna16.py [--shapes 4096x4096 ...] [--rows 1 4 ...] [--ops w4 w8 bf16] [--group 128] [--cold]
       [--threads 2] [--rounds 9] [--json FILE]

Shapes are N x K. Warm: the same weight each time; cold: weights in turn, more than 128 MB of them in each format, so
that none is in a cache. Up to four rows, `read` is nothing but reading the bytes of our weight, by as many threads: its
time is what no GEMM on this memory can be faster than. Peers: `int4pack` and `int8pack` are aten's weight-only GEMMs,
`linear` is F.linear with the bf16 weight. GB/s counts the packed weight alone; the peaks (--peak, --bandwidth) are
those of two Zen 5 cores.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench import machine
from pure_read import PureRead
from torch import Tensor

import quantkit.ops as ops

SHAPES = ("4096x4096", "14336x4096", "4096x14336", "2048x2048", "8192x2048", "2048x8192")
ROWS = (1, 4, 16, 64, 256, 1024)
COLD_BYTES = 128 << 20
SETTLED_BYTES = 64 << 20  # of weights: twice the caches
OURS = ("w4", "w8", "bf16")
READ_ROWS = 4

Call = Callable[[Tensor, int], Tensor | None]


def contenders(n: int, k: int, group: int, names: list[str], cold: bool) -> dict[str, tuple[int, Call]]:
    """Name -> bytes of the weight, y of x and the round. Weights that do not fit the caches are each packed anew."""
    scale = torch.rand(n, k // group).mul_(0.01).add_(0.01).bfloat16()  # as checkpoints have them
    cases: dict[str, tuple[int, Call]] = {}

    def add(name: str, make: Callable[[], tuple[Tensor, ...]], call: Callable[..., Tensor]) -> None:
        first = make()
        size = sum(t.nbytes for t in first)
        weights = [first] + [make() for _ in range(COLD_BYTES // size + 1 if cold else 0)]
        cases[name] = (size, lambda x, i: call(x, *weights[i % len(weights)]))
        if name in OURS:
            reads = [PureRead(w, torch.get_num_threads()) for w in weights]
            cases[f"read {name}"] = (size, lambda _, i: reads[i % len(reads)]())

    if "w4" in names:
        codes = torch.randint(-8, 8, (n, k), dtype=torch.int8)
        words, wide = ops.pack_int32(codes, 4), (codes + 8).int()
        pairs = torch.stack([scale.T, torch.zeros_like(scale.T)], -1).contiguous()
        convert, int4pack = (
            torch.ops.aten._convert_weight_to_int4pack_for_cpu,
            torch.ops.aten._weight_int4pack_mm_for_cpu,
        )
        add(
            "w4",
            lambda: (ops.pack_wna16(words, 4, k), ops.pack_wna16_scales(scale)),
            lambda x, w, s: ops.wna16_gemm(x, w, s, 4, n, group),
        )
        add("int4pack", lambda: (convert(wide, 1), pairs.clone()), lambda x, w, s: int4pack(x, w, group, s))
    if "w8" in names:
        codes8 = torch.randint(-128, 128, (n, k), dtype=torch.int8)
        words8, channel, int8pack = (
            ops.pack_int32(codes8, 8),
            torch.rand(n).bfloat16(),
            torch.ops.aten._weight_int8pack_mm,
        )
        add(
            "w8",
            lambda: (ops.pack_wna16(words8, 8, k), ops.pack_wna16_scales(scale)),
            lambda x, w, s: ops.wna16_gemm(x, w, s, 8, n, group),
        )
        add("int8pack", lambda: (codes8.clone(), channel), int8pack)
    weight = torch.randn(n, k).bfloat16()
    if "bf16" in names:
        add("bf16", lambda: (ops.pack_bf16(weight),), lambda x, w: ops.bf16_gemm(x, w, n))
    add("linear", lambda: (weight.clone(),), torch.nn.functional.linear)
    return cases


def measure(cases: dict[str, tuple[int, Call]], x: Tensor, rounds: int, cold: bool) -> dict[str, float]:
    """Seconds of a call, the least of the rounds: each case in turn, several calls a time if they are short.

    Untimed calls come first, as the one before may have left the caches full of lines that are yet to be written:
    F.linear lays its weight out anew at each call, which would cost whoever is next a fifth of its time.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    called = dict.fromkeys(cases, 0)
    for r in range(rounds + 1):
        for name, (size, call) in cases.items():
            repeats = settling = 1
            if r:
                least = min(seconds[name])
                repeats = max(1, min(20, int(0.004 / least)))
                settling = -(-SETTLED_BYTES // size) if cold else int(least < 0.004)
            for i in range(called[name], called[name] + settling):
                call(x, i)
            first = called[name] + settling
            called[name] = first + repeats
            started = time.perf_counter()
            for i in range(first, first + repeats):
                call(x, i)
            seconds[name].append((time.perf_counter() - started) / repeats)
    return {name: min(s[1:]) for name, s in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--ops", nargs="+", default=["w4"], choices=OURS)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--peak", type=float, default=980.0, help="GFLOP/s")
    parser.add_argument("--bandwidth", type=float, default=78.0, help="GB/s of memory")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    ops._load.require("cpu")
    print(", ".join(f"{key} {value}" for key, value in machine().items()), "cold" if args.cold else "warm")
    print(
        f"{'N x K':>12} {'M':>5} {'op':>9} {'us':>9} {'GB/s':>6} {'of peak':>8} {'GFLOP/s':>8} {'of peak':>8}   ours is"
    )
    figures: list[dict[str, Any]] = []
    for shape in args.shapes:
        n, k = map(int, shape.split("x"))
        cases = contenders(n, k, args.group, args.ops, args.cold)
        for m in args.rows:
            chosen = {name: c for name, c in cases.items() if m <= READ_ROWS or not name.startswith("read")}
            found = measure(chosen, torch.randn(m, k).bfloat16(), args.rounds, args.cold)
            for name, t in found.items():
                rate, flops = cases[name][0] / t / 1e9, 2 * m * n * k / t / 1e9
                reading = name.startswith("read")
                ratios = {p: found[p] / t for p in found if (name in OURS or reading) and p not in OURS}
                words = [f"{r:.2f} x {p}" for p, r in ratios.items() if not p.startswith("read")]
                if reading:
                    words = [f"nobody's ratio can be more than {', '.join(words)}"]
                elif f"read {name}" in ratios:
                    words.append(f"{ratios[f'read {name}']:.0%} of a pure read's speed")
                figures.append(
                    {"n": n, "k": k, "m": m, "op": name, "cold": args.cold, "seconds": t, "gbs": rate, "gflops": flops}
                )
                print(
                    f"{shape:>12} {m:5} {name:>9} {t * 1e6:9.1f} {rate:6.1f} {rate / args.bandwidth:8.0%} {flops:8.1f} "
                    f"{flops / args.peak:8.0%}   " + ", ".join(words)
                )
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "figures": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
