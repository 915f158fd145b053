"""How near the CUDA ops come to what the device can do: the least time their work takes over the time they take.

    python benchmarks/ops_cuda.py [--rows 4096 --cols 14336] [--peak GB/s] [--bf16 TFLOP/s] [--fp32 TFLOP/s]
        [--json FILE]

Ceilings are measured in the same run, unless named: a device-to-device copy of as many bytes, and torch's matrix
products of 8192 x 8192, bf16 and fp32. For the ops of the calibrated algorithms, the floor is the largest of the bytes
over the copy's rate, the fp32 operations and the bf16 operations that the task needs over the products' rates:

- gram_accumulate: the upper half of x^T x, tokens * cols^2 operations, in x's precision;
- gptq_sweep: rows * cols^2 fp32 operations (errors of earlier columns, each product and sum counted);
- awq_search: rows * cols^2 bf16 operations a candidate, half of a symmetric product; for fp32 losses the kernel makes
  three such products, so that a third of the roofline is all it can reach;
- mse_scale: 8 fp32 operations an element and candidate.

The sweep's columns wait for one another besides: --chain cycles of --clock for each are printed with it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
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
    fp8 = ops.quantize_fp8(x, scale, channel)
    yield "pack_w8a8", lambda: ops.pack_w8a8(codes), size(codes)
    yield "pack_fp8", lambda: ops.pack_fp8(fp8), size(fp8)
    yield "pack_bf16", lambda: ops.pack_bf16(x), size(x)
    yield "pack_wna16 4 bits", lambda: ops.pack_wna16(words, 4, x.shape[1]), size(words)
    yield "pack_w4a8", lambda: ops.pack_w4a8(words, x.shape[1]), size(words)
    local = ops.absmax(x, [1, 16]) / 6
    nibbles = ops.quantize_fp4(x, local, 16)
    yield "quantize_fp4 16", lambda: ops.quantize_fp4(x, local, 16), size(x, local)
    yield "unpack_fp4", lambda: ops.unpack_fp4(nibbles), size(nibbles)
    norm = torch.ones_like(x[0])
    yield "rms_norm", lambda: ops.rms_norm(x, norm, 1e-5), size(x)
    yield "add_rms_norm", lambda: ops.add_rms_norm(x, x, norm, 1e-5), 2 * size(x)
    yield "rms_norm_quant int8", lambda: ops.rms_norm_quant(x, norm, 1e-5), size(x)
    gate, up = x.chunk(2, -1)
    yield "silu_mul", lambda: ops.silu_mul(gate, up), size(x)
    yield "silu_mul_quant int8", lambda: ops.silu_mul_quant(gate, up), size(x)
    yield "quantization_error", lambda: ops.quantization_error(x, codes, scale, None, channel), size(x, codes)


Work = tuple[str, Callable[[], Any], float, float, float]


def calibrated(rows: int, cols: int, tokens: int) -> Iterator[Work]:
    """Name, call, bytes, fp32 operations and bf16 operations, all of them the least that the task needs."""
    g = torch.zeros(cols, cols, device="cuda")
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(tokens, cols, device="cuda").to(dtype)
        mask = torch.ones(tokens, dtype=torch.bool, device="cuda")
        channels = torch.zeros(3, cols, device="cuda")
        work = float(tokens) * cols**2
        moved = size(x) + 2 * size(g)
        operations = (0.0, work) if dtype == torch.bfloat16 else (work, 0.0)
        name = str(dtype).removeprefix("torch.")
        yield f"gram_accumulate {name}", lambda x=x: ops.gram_accumulate(x, g), moved, *operations
        yield (
            f"gram_accumulate {name} all",
            lambda x=x, mask=mask, channels=channels: ops.gram_accumulate(x, g, mask=mask, channels=channels),
            moved,
            *operations,
        )
        counts, span = torch.zeros(8192, dtype=torch.int64, device="cuda"), torch.zeros(1, device="cuda")
        yield (
            f"histogram_accumulate {name}",
            lambda x=x, counts=counts, span=span: ops.histogram_accumulate(x, counts, span),
            2 * size(x),  # the span first, then the counts
            0.0,
            0.0,
        )
    w = torch.randn(rows, cols, device="cuda")
    g = x.T @ x + torch.eye(cols, device="cuda")
    u, _ = ops.gptq_factor(g)
    how: dict[str, Any] = {"q_min": -8, "q_max": 7, "divisor": 7.5, "group_size": 128}
    work = float(rows) * cols**2
    search = {"search_range": 0.2, "search_steps": 20}
    yield "gptq_sweep", lambda: ops.gptq_sweep(w, u, **how), size(w, u) + size(w) / 4, work, 0.0
    yield "gptq_sweep search", lambda: ops.gptq_sweep(w, u, **how, **search), size(w, u) + size(w) / 4, work, 0.0
    half = w.bfloat16()
    scales = torch.exp(torch.randn(20, cols, device="cuda") / 4)
    yield "awq_search 20", lambda: ops.awq_search(half, g, scales, **how), size(half, g, scales), 0.0, 20 * work
    how.pop("group_size")
    for name, norm in (("2.4", 2.4), ("2", 2.0)):
        yield (
            f"mse_scale norm {name}",
            lambda norm=norm: ops.mse_scale(half, [1, 128], **how, norm=norm),
            size(half),
            8.0 * 21 * half.numel(),
            0.0,
        )
    a, b = x.abs().amax(0), w.abs().amax(0)
    yield "smoothquant_scales", lambda: ops.smoothquant_scales(a, b), size(a, b, a), 0.0, 0.0


def products(dtype: torch.dtype, flush: Tensor) -> float:
    """torch's rate, in operations a second, without TF32."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda").to(dtype) for _ in range(2))
    return 2 * n**3 / seconds(lambda: a @ b, flush, 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--cols", type=int, default=14336)
    parser.add_argument("--peak", type=float, help="bandwidth to compare with, in GB/s")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--bf16", type=float, help="rate of bf16 products to compare with, in TFLOP/s")
    parser.add_argument("--fp32", type=float, help="rate of fp32 products to compare with, in TFLOP/s")
    parser.add_argument("--clock", type=float, default=1.98, help="of the device, in GHz")
    parser.add_argument("--chain", type=float, default=40.0, help="cycles from one column of the sweep to the next")
    parser.add_argument("--json", type=Path, help="file for the results: seconds and fraction of the roofline")
    args = parser.parse_args()
    ops._load.require("cuda")
    torch.backends.cuda.matmul.allow_tf32 = False

    x = torch.randn(args.rows, args.cols, device="cuda").to(torch.bfloat16)
    flush = torch.empty(2 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(x)
    peak = args.peak or 2 * size(x) / seconds(lambda: target.copy_(x), flush) / 1e9
    results: dict[str, dict[str, float]] = {}
    print(f"{torch.cuda.get_device_name()}, bf16 {args.rows} x {args.cols}, ceiling {peak:.0f} GB/s")
    print(f"{'op':24} {'us':>8} {'GB/s':>8} {'of ceiling':>11}")
    for name, call, read in workloads(x):
        result = call()
        moved = read + size(*(result if isinstance(result, tuple) else (result,)))
        taken = seconds(call, flush)
        results[name] = {"seconds": taken, "roofline": moved / taken / 1e9 / peak}
        print(f"{name:24} {taken * 1e6:8.1f} {moved / taken / 1e9:8.0f} {moved / taken / 1e9 / peak:11.0%}")

    fp32 = args.fp32 * 1e12 if args.fp32 else products(torch.float32, flush)
    bf16 = args.bf16 * 1e12 if args.bf16 else products(torch.bfloat16, flush)
    print(f"\n{args.tokens} tokens; ceilings: {fp32 / 1e12:.0f} TFLOP/s fp32, {bf16 / 1e12:.0f} bf16")
    print(f"{'op':30} {'ms':>9} {'floor ms':>9} {'of roofline':>12}")
    for name, call, moved, single, half in calibrated(args.rows, args.cols, args.tokens):
        floor = max(moved / peak / 1e9, single / fp32, half / bf16)
        taken = seconds(call, flush, 10)
        results[name] = {"seconds": taken, "roofline": floor / taken}
        note = f"   chain {args.cols * args.chain / args.clock * 1e-6:.2f} ms" if name.startswith("gptq_sweep") else ""
        print(f"{name:30} {taken * 1e3:9.3f} {floor * 1e3:9.3f} {floor / taken:12.0%}{note}")
    if args.json:
        about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "gb_s": peak}
        args.json.write_text(json.dumps({**about, "fp32": fp32, "bf16": bf16, "ops": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
