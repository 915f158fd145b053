"""Every CPU op on a bf16 matrix: GB/s of what it reads and writes, and the share of what a copy reaches.

usage: python benchmarks/ops_cpu.py [--rows 4096] [--cols 14336] [--threads 2] [--rounds 15] [--fresh] [--cpu-time]
       [--json FILE]

Results go to memory that is there already, unless --fresh; the copy, which moves as many bytes in all, always
writes to memory that is there. Matrices alternate over more than 128 MB, so none is in a cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from bench import copies, keep_freed_memory, measure, report, start

import quantkit.ops as ops

CHANNEL, GROUP, BLOCK, COLUMN, TENSOR = [1, -1], [1, 128], [128, 128], [-1, 1], [-1, -1]


def workloads(matrices: list[torch.Tensor]) -> dict[str, tuple[int, Callable[[int], Any]]]:
    """Name -> bytes read and written, and the call on matrix i."""
    n, x = len(matrices), matrices[0]
    scale = ops.symmetric_scale(ops.absmax(x, CHANNEL), 127.0)
    low, high = ops.minmax(x, GROUP)
    step, zero_point = ops.asymmetric_scale(low, high, -128, 127)
    codes = [ops.quantize_int(m, scale, None, CHANNEL, -127, 127) for m in matrices]
    small = [ops.quantize_fp8(m, scale, CHANNEL) for m in matrices]
    words = [ops.pack_int32(c, 4) for c in codes]
    counts, span = torch.zeros(ops.HISTOGRAM_BINS, dtype=torch.int64), torch.zeros(1)

    def histogram(i: int) -> torch.Tensor:
        ops.histogram_accumulate(matrices[i % n], counts, span)
        return counts

    calls: dict[str, Callable[[int], Any]] = {
        "absmax channel": lambda i: ops.absmax(matrices[i % n], CHANNEL),
        "absmax g128": lambda i: ops.absmax(matrices[i % n], GROUP),
        "absmax 128 x 128": lambda i: ops.absmax(matrices[i % n], BLOCK),
        "absmax tensor": lambda i: ops.absmax(matrices[i % n], TENSOR),
        "absmax column": lambda i: ops.absmax(matrices[i % n], COLUMN),
        "minmax channel": lambda i: ops.minmax(matrices[i % n], CHANNEL),
        "minmax column": lambda i: ops.minmax(matrices[i % n], COLUMN),
        "quantize_int channel": lambda i: ops.quantize_int(matrices[i % n], scale, None, CHANNEL, -127, 127),
        "quantize_int g128": lambda i: ops.quantize_int(matrices[i % n], step, zero_point, GROUP, -128, 127),
        "quantize_fp8 channel": lambda i: ops.quantize_fp8(matrices[i % n], scale, CHANNEL),
        "dequantize int8": lambda i: ops.dequantize(codes[i % n], scale, None, CHANNEL, torch.bfloat16),
        "dequantize fp8": lambda i: ops.dequantize(small[i % n], scale, None, CHANNEL, torch.bfloat16),
        "int8 per token": lambda i: ops.int8_quant_per_token(matrices[i % n]),
        "int8 per token asym": lambda i: ops.int8_quant_per_token(matrices[i % n], symmetric=False),
        "fp8 per token": lambda i: ops.fp8_quant_per_token(matrices[i % n]),
        "pack 4 bits": lambda i: ops.pack_int32(codes[i % n], 4),
        "unpack 4 bits": lambda i: ops.unpack_int32(words[i % n], 4, x.shape[1]),
        "histogram_accumulate": histogram,
        "quantization_error": lambda i: ops.quantization_error(matrices[i % n], codes[i % n], scale, None, CHANNEL),
    }
    read = {"dequantize int8": codes[0].nbytes, "dequantize fp8": codes[0].nbytes, "pack 4 bits": codes[0].nbytes}
    read |= {"unpack 4 bits": words[0].nbytes, "quantization_error": x.nbytes + codes[0].nbytes}

    def written(result: Any) -> int:
        return sum(t.nbytes for t in (result if isinstance(result, tuple) else (result,)))

    return {name: (read.get(name, x.nbytes) + written(call(0)), call) for name, call in calls.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="results in fresh memory, as users call the ops")
    args, clock = start(parser, rounds=15)
    memory = "fresh" if args.fresh or not keep_freed_memory() else "kept"
    x = torch.randn(args.rows, args.cols, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    matrices = [x] + [x.clone() for _ in range(max(1, -(-(128 << 20) // x.nbytes)))]
    print(f"bf16 {args.rows} x {args.cols}, {len(matrices)} matrices in turn, {args.rounds} rounds, {memory} memory")
    cases = workloads(matrices)
    peers = {name: case for name, case in copies({n: b for n, (b, _) in cases.items()}).items() if "fresh" not in name}
    found = measure({**cases, **peers}, memory, args.rounds, clock=clock)
    print(f"{'':22}{'min ms':>9}{'median':>9}{'GB/s':>8}{'of a copy':>12}")
    for name in cases:
        t, copy = found[name], found[f"copy:{name}"]
        print(
            f"{name:22}{t.minimum * 1e3:9.2f}{t.median * 1e3:9.2f}{t.rate:8.1f}{copy.minimum / t.minimum:12.0%}"
            f" ({copy.rate:.0f} GB/s)"
        )
    report(list(found.values()), args.json, rows=args.rows, cols=args.cols)


if __name__ == "__main__":
    main()
