"""w4a8_gemm in turns with its peers: ms, GB/s of weights and scales, GOPS, share of the peak, ratio to each peer.

usage: python benchmarks/w4a8.py [--shapes 4096x4096,14336x4096] [--rows 1,4,16,64,256,1024] [--group 128]
       [--regime cold|warm] [--seconds 0.25] [--threads 2] [--scales float32|bfloat16] [--zero-points]
       [--peers int4pack,w8a8,wna16] [--isa avx2]

Shapes are K x N, in x out features. x is bf16 and quantizing it counts. Cold: weights take turns over more than 128 MB
of distinct ones, so none is in a cache. Warm: one weight. Peers: torch's _weight_int4pack_mm_for_cpu, and quantkit's
w8a8_gemm and wna16_gemm, all with x in bf16.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from bench import LIMITS, keep_freed_memory, limit_isa, machine

import quantkit.ops as ops
from quantkit.ops.isa import current_isa

# Of this machine's two cores (Zen 5): vpdpbusd, and reading memory.
PEAK_GOPS, PEAK_GBS = 2050.0, 78.0
COLD_BYTES = 136 << 20
Call = Callable[[torch.Tensor, int], Any]


def weights(n: int, k: int, args: argparse.Namespace) -> tuple[dict[str, Call], int, int]:
    """Name -> call on weight i, how many weights there are, and the bytes of one."""
    g = args.group if args.group > 0 else k
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (n, k), generator=generator, dtype=torch.int8)
    words = ops.pack_int32(codes, 4)
    scale = torch.rand(n, k // g, generator=generator) * 0.01 + 0.01
    scale = scale.to(getattr(torch, args.scales))
    none = torch.zeros(n, k // g, dtype=torch.int8) if args.zero_points else None
    size = codes.nbytes // 2 + scale.nbytes + (none.nbytes if none is not None else 0)
    copies = -(-COLD_BYTES // size) if args.regime == "cold" else 1

    # Each is packed anew, not copied: memory comes as the ops ask for it, as it does when a model is loaded.
    ours = [
        (ops.pack_w4a8(words, k), ops.pack_w4a8_scales(scale), None if none is None else ops.pack_w4a8_scales(none))
        for _ in range(copies)
    ]

    def w4a8(x: torch.Tensor, i: int) -> torch.Tensor:
        words, scales, zero = ours[i]
        return ops.w4a8_gemm(x, words, scales, n, args.group, weight_zero_point=zero)

    calls: dict[str, Call] = {"w4a8": w4a8}
    peers = args.peers.split(",")
    if "int4pack" in peers and g in (32, 64, 128, 256):
        unsigned = codes.int() + 8
        pair = torch.stack([scale.T, torch.zeros_like(scale.T)], -1).bfloat16().contiguous()
        theirs = [
            (torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 1), pair.clone()) for _ in range(copies)
        ]
        calls["int4pack"] = lambda x, i: torch.ops.aten._weight_int4pack_mm_for_cpu(x, theirs[i][0], g, theirs[i][1])
    if "w8a8" in peers:
        eight = [ops.pack_w8a8(codes) for _ in range(-(-copies * size // (n * k)))]
        channel = torch.rand(n) * 0.01
        calls["w8a8"] = lambda x, i: ops.w8a8_gemm(x, eight[i % len(eight)], channel, n)
    if "wna16" in peers:
        sixteen = [(ops.pack_wna16(words, 4, k), ops.pack_wna16_scales(scale)) for _ in range(copies)]
        zeros = None if none is None else [ops.pack_wna16_scales(none) for _ in range(copies)]
        calls["wna16"] = lambda x, i: ops.wna16_gemm(
            x, *sixteen[i], 4, n, args.group, weight_zero_point=zeros and zeros[i]
        )
    return calls, copies, size


def measure(calls: dict[str, Call], x: torch.Tensor, copies: int, seconds: float) -> dict[str, tuple[float, float]]:
    """Minimum and median seconds of each call, in turns, at least seven rounds."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    started, i = time.perf_counter(), 0
    while time.perf_counter() - started < 0.1:  # threads and clocks are awake after this
        for call in calls.values():
            call(x, 0)
    order, started = list(calls.items()), time.perf_counter()
    shuffle = random.Random(0)
    while i < 9 or time.perf_counter() - started < seconds * len(calls):
        shuffle.shuffle(order)  # whoever follows a slow one finds cold caches and a cool core
        for name, call in order:
            begin = time.perf_counter()
            call(x, i % copies)
            times[name].append(time.perf_counter() - begin)
        i += 1
    return {name: (min(t[2:]), statistics.median(t[2:])) for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="4096x4096,4096x14336,14336x4096,2048x2048,2048x8192,8192x2048")
    parser.add_argument("--rows", default="1,4,16,64,256,1024")
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--regime", choices=("cold", "warm"), default="cold")
    parser.add_argument("--seconds", type=float, default=0.25, help="of each figure")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scales", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--zero-points", action="store_true")
    parser.add_argument("--peers", default="int4pack,w8a8")
    parser.add_argument("--isa", choices=tuple(LIMITS), help="the most that ours and torch may use")
    args = parser.parse_args()
    limit_isa(args.isa)
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    ops._load.require("cpu")
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    print(f"{args.regime} weights, groups of {args.group}, {args.scales} scales, x bf16; median of each, in turns")
    if current_isa().name != "avx512":
        print("peaks are those of AVX-512 VNNI")
    for shape in args.shapes.split(","):
        k, n = map(int, shape.split("x"))
        calls, copies, size = weights(n, k, args)
        print(f"K {k} N {n}, {size / 1e6:.1f} MB, {copies} weights")
        for m in map(int, args.rows.split(",")):
            x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).bfloat16()
            found = measure(calls, x, copies, args.seconds)
            least, ours = found["w4a8"]
            gops, rate = 2 * m * n * k / ours / 1e9, size / ours / 1e9
            peers = "".join(
                f"  {name} {t * 1e3:8.3f} ms = {t / ours:5.2f}x" for name, (_, t) in found.items() if name != "w4a8"
            )
            print(
                f"  M {m:5d} {ours * 1e3:8.3f} ms (min {least * 1e3:8.3f}) {rate:6.1f} GB/s {rate / PEAK_GBS:4.0%}"
                f" {gops:7.0f} GOPS {gops / PEAK_GOPS:4.0%}{peers}",
                flush=True,
            )


if __name__ == "__main__":
    main()
