"""CUDA attention against F.scaled_dot_product_attention in bf16, and the 8-bit KV cache: what is appended, and decoding
from it against the same function on a bf16 cache. The L2 cache is flushed before each run.

    python benchmarks/attention_cuda.py [--tokens 4096,8192,16384,32768] [--heads 32 --kv-heads 8 --size 128]
        [--batch 8] [--runs 10] [--json FILE] [--dry-run]

Prefill: one row of so many tokens, causal, torch's flash kernel; 4 D T^2 / 2 operations a head, and how many times as
fast as flash. The error is that of the last 64 queries, relative to fp32 in the 2-norm. Decoding: one query a row of
the batch, all tokens before it in the cache; bytes are those of the cache, once, against what a copy moves.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from device import Device, add_arguments, size
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import quantkit.ops as ops


def flash(device: Device, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """torch's flash kernel, with the heads of k and v repeated beforehand if it takes no groups of queries."""

    def call(k: Tensor, v: Tensor, **groups: Any) -> Tensor:
        with nullcontext() if device.dry else sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, **groups)

    try:
        call(k, v, enable_gqa=True)
    except RuntimeError:
        times = q.shape[1] // k.shape[1]
        return partial(call, k.repeat_interleave(times, 1), v.repeat_interleave(times, 1))
    return partial(call, k, v, enable_gqa=True)


def error_of(got: Tensor, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Of the last queries, whose sums are the longest."""
    last = min(64, q.shape[2])
    times = q.shape[1] // k.shape[1]
    keys, values = (t.float().repeat_interleave(times, 1) for t in (k, v))
    scores = q[:, :, -last:].float() @ keys.transpose(-1, -2) / math.sqrt(q.shape[-1])
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(k.shape[2] - last)
    wanted = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values
    return float((got[:, :, -last:].float() - wanted).norm() / wanted.norm())


def prefill(device: Device, args: argparse.Namespace, tokens: int) -> list[dict[str, Any]]:
    q = device.randn(1, args.heads, tokens, args.size, dtype=torch.bfloat16)
    k, v = (device.randn(1, args.kv_heads, tokens, args.size, dtype=torch.bfloat16) for _ in range(2))
    cases: dict[str, Callable[[], Tensor]] = {
        "SDPA flash": flash(device, q, k, v),
        "attention": partial(ops.attention, q, k, v, causal=True),
    }
    for pv, name in enumerate(("values bf16", "values int8")):
        for per_token in (True, False):
            cases[f"sage_attention {name}, {'token' if per_token else 'block'}"] = partial(
                ops.sage_attention, q, k, v, causal=True, pv=pv, per_token=per_token
            )
    operations = 2.0 * args.size * tokens**2 * args.heads
    found, first = [], 0.0
    for name, call in cases.items():
        error, taken = error_of(call(), q, k, v), device.seconds(call, args.runs)
        first = first or taken
        rate = operations / taken / 1e12
        print(f"{tokens:>7} {name:34} {taken * 1e3:9.3f} {rate:8.1f} {first / taken:8.2f} {error:9.1e}")
        found.append({"op": name, "tokens": tokens, "seconds": taken, "speedup": first / taken, "error": error})
    return found


def cache(device: Device, args: argparse.Namespace, tokens: int, peak: float) -> list[dict[str, Any]]:
    k, v = (device.randn(args.batch, args.kv_heads, tokens, args.size, dtype=torch.bfloat16) for _ in range(2))
    q = device.randn(args.batch, args.heads, 1, args.size, dtype=torch.bfloat16)
    places = torch.arange(tokens, device=device.torch).expand(args.batch, -1)
    peer = partial(F.scaled_dot_product_attention, q, k, v, enable_gqa=True)
    cases: list[tuple[str, Callable[[], Any], int]] = [("SDPA on a bf16 cache", peer, size(k, v))]
    for dtype in (torch.int8, torch.float8_e4m3fn):
        a, b = (torch.zeros(k.shape, dtype=dtype, device=device.torch) for _ in range(2))
        sa, sb = (torch.zeros(k.shape[:3], device=device.torch) for _ in range(2))
        name = str(dtype).removeprefix("torch.")
        every = partial(ops.kv_append, k, v, a, b, sa, sb, places)
        cases.append((f"kv_append {name}, all tokens", every, size(k, v, a, b, sa, sb)))
        one = partial(ops.kv_append, k[:, :, -1:], v[:, :, -1:], a, b, sa, sb, places[:, -1:])
        cases.append((f"kv_append {name}, one token", one, 0))
        cases.append((f"kv_attention {name}", partial(ops.kv_attention, q, a, b, sa, sb), size(a, b, sa, sb)))
    found, first = [], 0.0
    for name, call, moved in cases:
        taken = device.seconds(call, args.runs)
        first = first or taken
        compared = f"{first / taken:8.2f}" if "attention" in name else ""
        share = f"{moved / taken / peak:13.0%}" if moved else f"{'':13}"
        print(f"{tokens:>7} {name:34} {taken * 1e6:9.1f} {share} {compared}")
        found.append({"op": name, "tokens": tokens, "batch": args.batch, "seconds": taken, "bytes": moved})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="4096,8192,16384,32768")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--size", type=int, default=128, help="of a head")
    parser.add_argument("--batch", type=int, default=8, help="rows that decode")
    parser.add_argument("--runs", type=int, default=10)
    add_arguments(parser)
    args = parser.parse_args()
    if args.heads % args.kv_heads:
        parser.error(f"--heads must be a multiple of --kv-heads, got {args.heads} and {args.kv_heads}")
    device = Device(args.dry_run)
    if args.dry_run:
        args.tokens, args.heads, args.kv_heads, args.batch = "70,128", 4, 2, 2

    peak = device.copy_rate()
    print(f"{device.name}, torch {torch.__version__}, copy {peak / 1e9:.0f} GB/s")
    counts = [int(n) for n in args.tokens.split(",")]
    results = []
    print(f"\ncausal, {args.heads} heads of {args.size}, {args.kv_heads} of keys and values, bf16")
    print(f"{'tokens':>7} {'op':34} {'ms':>9} {'TFLOP/s':>8} {'speedup':>8} {'error':>9}")
    for tokens in counts:
        results += prefill(device, args, tokens)
    print(f"\ncaches of {args.batch} rows, {args.kv_heads} heads of {args.size}; queries of {args.heads} heads")
    print(f"{'tokens':>7} {'op':34} {'us':>9} {'of bandwidth':>13} {'speedup':>8}")
    for tokens in counts:
        results += cache(device, args, tokens, peak)
    device.save(args.json, results, bytes_s=peak)


if __name__ == "__main__":
    main()
