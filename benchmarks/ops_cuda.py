"""How near the CUDA ops come to what the device can do: the least time their work takes over the time they take.

    python benchmarks/ops_cuda.py [--rows 4096 --cols 14336] [--peak GB/s] [--bf16 TFLOP/s] [--fp32 TFLOP/s]
        [--json FILE] [--dry-run]

Ceilings are measured in the same run, unless named: a device-to-device copy of as many bytes, and torch's matrix
products of 8192 x 8192, bf16 and fp32. For the ops of the calibrated algorithms, the floor is the largest of the bytes
over the copy's rate, the fp32 operations and the bf16 operations that the task needs over the products' rates:

- gram_accumulate: the upper half of x^T x, tokens * cols^2 operations, in x's precision;
- gptq_factor (torch's Cholesky): cols^3 / 3 fp32 operations;
- gptq_sweep: rows * cols^2 fp32 operations (errors of earlier columns, each product and sum counted);
- awq_search: rows * cols^2 bf16 operations a candidate, half of a symmetric product; for fp32 losses the kernel makes
  three such products, so that a third of the roofline is all it can reach;
- mse_scale: 8 fp32 operations an element and candidate;
- percentile_scale and histogram_scale: one reading, of blocks and of counts (a launch or two: far from any floor).

The sweep's columns wait for one another besides: --chain cycles of --clock for each are printed with it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from device import Device, add_arguments, size
from torch import Tensor

import quantkit.ops as ops


def workloads(x: Tensor) -> Iterator[tuple[str, Callable[[], Any], int]]:
    """Name, call, and the input's bytes; what it returns is counted when it has run."""
    channel, group, block = [1, -1], [1, 128], [128, 128]
    scale = ops.symmetric_scale(ops.absmax(x, channel), 127.0)
    codes = ops.quantize_int(x, scale, None, channel, -127, 127)
    words = ops.pack_int32(codes, 4)
    for name, shape in (("tensor", [-1, -1]), ("channel", channel), ("group", group), ("column", [-1, 1])):
        yield f"absmax {name}", partial(ops.absmax, x, shape), size(x)
    yield "minmax channel", lambda: ops.minmax(x, channel), size(x)
    yield "quantize_int channel", lambda: ops.quantize_int(x, scale, None, channel, -127, 127), size(x)
    yield "quantize_fp8 channel", lambda: ops.quantize_fp8(x, scale, channel), size(x)
    yield "dequantize channel", lambda: ops.dequantize(codes, scale, None, channel, x.dtype), size(codes)
    yield "int8_quant_per_token", lambda: ops.int8_quant_per_token(x), size(x)
    yield "fp8_quant_per_token", lambda: ops.fp8_quant_per_token(x), size(x)
    yield "rtn_int8 channel", lambda: ops.rtn_int(x, channel, q_min=-127, q_max=127, divisor=127.0), size(x)
    four: dict[str, Any] = {"q_min": -8, "q_max": 7, "divisor": 7.5, "scale_dtype": x.dtype, "pack_bits": 4}
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
    heads = x[:, :2048].reshape(1, len(x), -1, 128).transpose(1, 2)
    angles = torch.outer(torch.arange(len(x), device=x.device), torch.ones(128, device=x.device))[None]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    yield "rotary_embedding", lambda: ops.rotary_embedding(heads, cos, sin), size(heads, cos, sin)
    gate, up = x.chunk(2, -1)
    yield "silu_mul", lambda: ops.silu_mul(gate, up), size(x)
    yield "silu_mul_quant int8", lambda: ops.silu_mul_quant(gate, up), size(x)
    yield "quantization_error", lambda: ops.quantization_error(x, codes, scale, None, channel), size(x, codes)


Work = tuple[str, Callable[[], Any], float, float, float]


def calibrated(device: Device, rows: int, cols: int, tokens: int) -> Iterator[Work]:
    """Name, call, bytes, fp32 operations and bf16 operations, all of them the least that the task needs."""
    g = torch.zeros(cols, cols, device=device.torch)
    for dtype in (torch.bfloat16, torch.float32):
        x = device.randn(tokens, cols, dtype=dtype)
        mask = torch.ones(tokens, dtype=torch.bool, device=device.torch)
        channels = torch.zeros(3, cols, device=device.torch)
        work = float(tokens) * cols**2
        moved = size(x) + 2 * size(g)
        operations = (0.0, work) if dtype == torch.bfloat16 else (work, 0.0)
        name = str(dtype).removeprefix("torch.")
        yield f"gram_accumulate {name}", partial(ops.gram_accumulate, x, g), moved, *operations
        everything = partial(ops.gram_accumulate, x, g, mask=mask, channels=channels)
        yield f"gram_accumulate {name} all", everything, moved, *operations
        counts = torch.zeros(8192, dtype=torch.int64, device=device.torch)
        span = torch.zeros(1, device=device.torch)
        # x is read for the span first, then for the counts.
        counting = partial(ops.histogram_accumulate, x, counts, span)
        yield f"histogram_accumulate {name}", counting, 2 * size(x), 0.0, 0.0
    codes: dict[str, Any] = {"q_min": -127, "q_max": 127, "divisor": 127.0}
    ends = torch.stack((x.min(), x.max()))
    for method in ("percentile", "mse", "kl", "eq", "admm"):
        one = partial(ops.histogram_scale, counts, span, ends, method=method, **codes)
        yield f"histogram_scale {method}", one, size(counts), 0.0, 0.0
    w = device.randn(rows, cols)
    g = x.T @ x + torch.eye(cols, device=device.torch)
    u, _ = ops.gptq_factor(g)
    yield "gptq_factor", lambda: ops.gptq_factor(g), 2 * size(g), cols**3 / 3, 0.0
    few = min(cols, 2048)  # of a batch torch factors all matrices at once
    experts = g[:few, :few].repeat(8, 1, 1)
    yield f"gptq_factor 8 x {few}", lambda: ops.gptq_factor(experts), 2 * size(experts), 8 * few**3 / 3, 0.0
    how: dict[str, Any] = {"q_min": -8, "q_max": 7, "divisor": 7.5, "group_size": 128}
    work = float(rows) * cols**2
    search: dict[str, Any] = {"search_range": 0.2, "search_steps": 20}
    yield "gptq_sweep", lambda: ops.gptq_sweep(w, u, **how), size(w, u) + size(w) / 4, work, 0.0
    yield "gptq_sweep search", lambda: ops.gptq_sweep(w, u, **how, **search), size(w, u) + size(w) / 4, work, 0.0
    half = w.bfloat16()
    scales = torch.exp(device.randn(20, cols) / 4)
    yield "awq_search 20", lambda: ops.awq_search(half, g, scales, **how), size(half, g, scales), 0.0, 20 * work
    how.pop("group_size")
    for name, norm in (("2.4", 2.4), ("2", 2.0)):
        searching = partial(ops.mse_scale, half, [1, 128], **how, norm=norm)
        yield f"mse_scale norm {name}", searching, size(half), 8.0 * 21 * half.numel(), 0.0
    for name, block in (("group", [1, 128]), ("channel", [1, -1]), ("tensor", [-1, -1])):
        ranking = partial(ops.percentile_scale, half, block, **how)
        yield f"percentile_scale {name}", ranking, size(half), 0.0, 0.0
    a, b = x.abs().amax(0), w.abs().amax(0)
    yield "smoothquant_scales", lambda: ops.smoothquant_scales(a, b), size(a, b, a), 0.0, 0.0


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
    add_arguments(parser)
    args = parser.parse_args()
    device = Device(args.dry_run)
    if args.dry_run:
        args.rows, args.cols, args.tokens = 64, 4096, 16

    x = device.randn(args.rows, args.cols, dtype=torch.bfloat16)
    peak = args.peak or device.copy_rate(size(x)) / 1e9
    results: dict[str, dict[str, float]] = {}
    print(f"{device.name}, bf16 {args.rows} x {args.cols}, ceiling {peak:.0f} GB/s")
    print(f"{'op':24} {'us':>8} {'GB/s':>8} {'of ceiling':>11}")
    for name, call, read in workloads(x):
        result = call()
        moved: float = read + size(*(result if isinstance(result, tuple) else (result,)))
        taken = device.seconds(call)
        results[name] = {"seconds": taken, "roofline": moved / taken / 1e9 / peak}
        print(f"{name:24} {taken * 1e6:8.1f} {moved / taken / 1e9:8.0f} {moved / taken / 1e9 / peak:11.0%}")

    fp32 = args.fp32 * 1e12 if args.fp32 else device.product_rate(torch.float32)
    bf16 = args.bf16 * 1e12 if args.bf16 else device.product_rate(torch.bfloat16)
    print(f"\n{args.tokens} tokens; ceilings: {fp32 / 1e12:.0f} TFLOP/s fp32, {bf16 / 1e12:.0f} bf16")
    print(f"{'op':30} {'ms':>9} {'floor ms':>9} {'of roofline':>12}")
    for name, call, moved, single, half in calibrated(device, args.rows, args.cols, args.tokens):
        floor = max(moved / peak / 1e9, single / fp32, half / bf16)
        taken = device.seconds(call, 10)
        results[name] = {"seconds": taken, "roofline": floor / taken}
        note = f"   chain {args.cols * args.chain / args.clock * 1e-6:.2f} ms" if name.startswith("gptq_sweep") else ""
        print(f"{name:30} {taken * 1e3:9.3f} {floor * 1e3:9.3f} {floor / taken:12.0%}{note}")
    device.save(args.json, results, bytes_s=peak * 1e9, fp32=fp32, bf16=bf16)


if __name__ == "__main__":
    main()
