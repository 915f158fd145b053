"""How near the CUDA ops come to the memory bandwidth of the device: bytes they must move over the time they take.

    python benchmarks/ops_cuda.py [--rows 4096 --cols 14336] [--peak GB/s]

The ceiling is a device-to-device copy of as many bytes, measured in the same run, unless --peak names one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import quantkit.ops as ops


def seconds(call: Callable[[], Any], flush: Tensor, runs: int = 30) -> float:
    """Median time on the device, the L2 cache overwritten before each run."""
    call()
    times = []
    for _ in range(runs):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[runs // 2]


def size(*tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def workloads(x: Tensor) -> Iterator[tuple[str, Callable[[], Any], int]]:
    """Name, call, and the input's bytes; what it returns is counted when it has run."""
    channel, group, block = [1, -1], [1, 128], [128, 128]
    scale = ops.symmetric_scale(ops.absmax(x, channel), 127.0)
    codes = ops.quantize_int(x, scale, None, channel, -127, 127)
    words = ops.pack_int32(codes, 4)
    for name, shape in (("tensor", [-1, -1]), ("channel", channel), ("group", group), ("column", [-1, 1])):
        yield f"absmax {name}", lambda shape=shape: ops.absmax(x, shape), size(x)
    yield "minmax channel", lambda: ops.minmax(x, channel), size(x)
    yield "quantize_int channel", lambda: ops.quantize_int(x, scale, None, channel, -127, 127), size(x)
    yield "quantize_fp8 channel", lambda: ops.quantize_fp8(x, scale, channel), size(x)
    yield "dequantize channel", lambda: ops.dequantize(codes, scale, None, channel, x.dtype), size(codes)
    yield "int8_quant_per_token", lambda: ops.int8_quant_per_token(x), size(x)
    yield "fp8_quant_per_token", lambda: ops.fp8_quant_per_token(x), size(x)
    yield "rtn_int8 channel", lambda: ops.rtn_int(x, channel, q_min=-127, q_max=127, divisor=127.0), size(x)
    four = {"q_min": -8, "q_max": 7, "divisor": 7.5, "scale_dtype": x.dtype, "pack_bits": 4}
    yield "rtn_int4 group packed", lambda: ops.rtn_int(x, group, **four), size(x)
    yield "rtn_int4 asymmetric", lambda: ops.rtn_int(x, group, **{**four, "symmetric": False}), size(x)
    yield "rtn_fp8 block", lambda: ops.rtn_fp8(x, block), size(x)
    yield "pack_int32 4 bits", lambda: ops.pack_int32(codes, 4), size(codes)
    yield "unpack_int32 4 bits", lambda: ops.unpack_int32(words, 4, x.shape[1]), size(words)
    yield "quantization_error", lambda: ops.quantization_error(x, codes, scale, None, channel), size(x, codes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--cols", type=int, default=14336)
    parser.add_argument("--peak", type=float, help="bandwidth to compare with, in GB/s")
    args = parser.parse_args()
    ops._load.require("cuda")

    x = torch.randn(args.rows, args.cols, device="cuda").to(torch.bfloat16)
    flush = torch.empty(2 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(x)
    peak = args.peak or 2 * size(x) / seconds(lambda: target.copy_(x), flush) / 1e9
    print(f"{torch.cuda.get_device_name()}, bf16 {args.rows} x {args.cols}, ceiling {peak:.0f} GB/s")
    print(f"{'op':24} {'us':>8} {'GB/s':>8} {'of ceiling':>11}")
    for name, call, read in workloads(x):
        result = call()
        moved = read + size(*(result if isinstance(result, tuple) else (result,)))
        taken = seconds(call, flush)
        print(f"{name:24} {taken * 1e6:8.1f} {moved / taken / 1e9:8.0f} {moved / taken / 1e9 / peak:11.0%}")


if __name__ == "__main__":
    main()
