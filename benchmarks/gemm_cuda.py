"""The CUDA GEMMs against bf16 F.linear, torch._int_mm and torch._scaled_mm, in turns, the L2 cache flushed.

    python benchmarks/gemm_cuda.py [--shapes 8192x8192,28672x8192] [--tokens 1,8,16,64,256,2048] [--runs 20]
        [--paths default,sm80,sm89,sm90] [--json FILE] [--dry-run]

For each weight N x K and number of tokens M: microseconds, the share of the copy's bandwidth that reading the weight
once makes, TFLOP/s (2 M N K), and how many times as fast as bf16 F.linear. x is bf16; what our ops do to it before
(int8 or FP8 codes) is in their time, and not in that of torch's products, which get codes.

`--paths`: our ops with the kernels of QUANTKIT_CUDA_GEMM, as far as the device has them (sm90: wgmma even for few rows;
sm89: mma of FP8); `default` is what users get. Where a path has no kernel of its own the one below serves, and is
measured again. The threshold of csrc/cuda/sm90/gemm.h is where sm90 overtakes sm80 here.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from device import Device, add_arguments, size

import quantkit.ops as ops

GROUP = 128
PATHS = ("default", "sm80", "sm89", "sm90")


def there(path: str, capability: tuple[int, int]) -> bool:
    major, minor = capability
    return (
        path == "default" or (path == "sm90" and major == 9) or (path != "sm90" and int(path[2:]) <= major * 10 + minor)
    )


def products(device: Device, rows: int, cols: int, depth: int) -> Iterator[tuple[str, Callable[[], Any], int]]:
    """Name (ours have `_gemm` in it), call and the weight's bytes; the first is what the others are compared with."""
    x = device.randn(rows, depth, dtype=torch.bfloat16)
    w = device.randn(cols, depth, dtype=torch.bfloat16) / depth**0.5
    yield "bf16 F.linear", lambda: F.linear(x, w), size(w)

    packed = ops.pack_bf16(w)
    yield "bf16_gemm", lambda: ops.bf16_gemm(x, packed, cols), size(packed)

    int8, scale = ops.rtn_int(w, [1, -1], q_min=-127, q_max=127, divisor=127.0)[:2]
    eight, one = ops.pack_w8a8(int8), scale.flatten()
    yield "w8a8_gemm", lambda: ops.w8a8_gemm(x, eight, one, cols), size(eight)
    codes = ops.int8_quant_per_token(x)[0]
    yield "int8_gemm", lambda: ops.int8_gemm(codes, eight, cols), size(eight)
    if rows > 16:
        yield "torch._int_mm", lambda: torch._int_mm(codes, int8.T), size(int8)

    how: dict[str, Any] = {"q_min": -8, "q_max": 7, "divisor": 7.5, "scale_dtype": torch.bfloat16, "pack_bits": 4}
    words, groups = ops.rtn_int(w, [1, GROUP], **how)[:2]
    four = ops.pack_wna16(words, 4, depth)
    yield (
        f"wna16_gemm 4 bits g{GROUP}",
        lambda: ops.wna16_gemm(x, four, groups, 4, cols, GROUP),
        size(four, groups),
    )
    mixed, placed = ops.pack_w4a8(words, depth), ops.pack_w4a8_scales(groups)
    yield f"w4a8_gemm g{GROUP}", lambda: ops.w4a8_gemm(x, mixed, placed, cols, GROUP), size(mixed, placed)

    fp8, channel = ops.rtn_fp8(w, [1, -1])
    small = ops.pack_fp8(fp8)
    yield "fp8_gemm token", lambda: ops.fp8_gemm(x, small, channel, [1, -1], cols, input_block=[1, -1]), size(small)
    blocks, grid = ops.rtn_fp8(w, [128, 128])
    large = ops.pack_fp8(blocks)
    yield (
        "fp8_gemm blocks",
        lambda: ops.fp8_gemm(x, large, grid, [128, 128], cols, input_block=[1, 128]),
        size(large, grid),
    )
    yield "fp8_gemm 16-bit x", lambda: ops.fp8_gemm(x, small, channel, [1, -1], cols), size(small)
    if device.capability >= (8, 9):
        a, s = ops.fp8_quant_per_token(x)
        yield (
            "torch._scaled_mm rows",
            lambda: torch._scaled_mm(a, fp8.T, scale_a=s, scale_b=channel.T, out_dtype=torch.bfloat16),
            size(fp8),
        )
        one_scale = torch.ones((), device=device.torch)
        yield (
            "torch._scaled_mm tensor",
            lambda: torch._scaled_mm(a, fp8.T, scale_a=one_scale, scale_b=one_scale, out_dtype=torch.bfloat16),
            size(fp8),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="8192x8192,28672x8192", help="weights, N x K")
    parser.add_argument("--tokens", default="1,8,16,64,256,2048")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--paths", default="default", help=f"of {','.join(PATHS)}")
    add_arguments(parser)
    args = parser.parse_args()
    paths = args.paths.split(",")
    if unknown := set(paths) - set(PATHS):
        parser.error(f"--paths must be of {', '.join(PATHS)}, got {', '.join(sorted(unknown))}")
    device = Device(args.dry_run)
    if args.dry_run:
        args.shapes, args.tokens = "256x512", "1,20"

    peak = device.copy_rate()
    results: list[dict[str, Any]] = []
    print(f"{device.name}, torch {torch.__version__}, copy {peak / 1e9:.0f} GB/s")
    for shape in args.shapes.split(","):
        cols, depth = map(int, shape.split("x"))
        for rows in map(int, args.tokens.split(",")):
            print(f"\nM {rows}, N {cols}, K {depth}")
            print(f"{'product':24} {'path':8} {'us':>9} {'of bandwidth':>13} {'TFLOP/s':>8} {'speedup':>8}")
            first = 0.0
            for name, call, read in products(device, rows, cols, depth):
                for path in [p for p in paths if there(p, device.capability)] if "_gemm" in name else [""]:
                    os.environ.pop("QUANTKIT_CUDA_GEMM", None)
                    if path.startswith("sm"):
                        os.environ["QUANTKIT_CUDA_GEMM"] = path
                    taken = device.seconds(call, args.runs)
                    first = first or taken
                    work = 2.0 * rows * cols * depth / taken / 1e12
                    print(
                        f"{name:24} {path:8} {taken * 1e6:9.1f} {read / taken / peak:13.0%} {work:8.1f} "
                        f"{first / taken:8.2f}"
                    )
                    case = {"product": name, "path": path, "m": rows, "n": cols, "k": depth}
                    results.append({**case, "seconds": taken, "weight_bytes": read, "speedup": first / taken})
    device.save(args.json, results, bytes_s=peak)


if __name__ == "__main__":
    main()
