"""sage_attention and attention against F.scaled_dot_product_attention in bf16, with their errors; decoding from an
8-bit KV cache against the same function on a bf16 cache, and against two matrix products on it. All in turns, in one
run.

    python benchmarks/attention.py                     # everything, about two minutes
    python benchmarks/attention.py --only prefill --tokens 1024 4096
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from bench import machine
from torch import Tensor

from quantkit import ops
from quantkit.models.attention import single

# Of two cores of the machine that docs/benchmarks.md describes: int8 dot products, bf16 dot products, memory.
INT8_PEAK, BF16_PEAK, MEMORY = 2.0e12, 0.98e12, 78e9


def in_turns(cases: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, float]:
    """Seconds of the best round of each."""
    best = dict.fromkeys(cases, math.inf)
    for i in range(rounds + 1):
        for name, function in cases.items():
            started = time.perf_counter()
            function()
            if i:
                best[name] = min(best[name], time.perf_counter() - started)
    return best


def prefill(tokens: list[int], heads: int, kv_heads: int, size: int) -> None:
    print(f"\ncausal, {heads} heads of {size}, {kv_heads} of keys and values, bf16; 4 D T^2 / 2 operations a head")
    print(f"{'tokens':>7} {'':24} {'ms':>9} {'GFLOP/s':>8} {'of peak':>8} {'ratio':>6}")
    for n in tokens:
        q = torch.randn(1, heads, n, size).bfloat16()
        k, v = (torch.randn(1, kv_heads, n, size).bfloat16() for _ in range(2))
        cases = {
            "SDPA, bf16": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        }
        cases["all in bf16"] = lambda q=q, k=k, v=v: ops.attention(q, k, v, causal=True)
        for pv, name in enumerate(("values in bf16", "values in int8")):
            for per_token in (True, False):
                cases[f"{name}, {'token' if per_token else 'block'}"] = lambda q=q, k=k, v=v, pv=pv, p=per_token: (
                    ops.sage_attention(q, k, v, causal=True, pv=pv, per_token=p)
                )
        operations = 4 * size * n * n / 2 * heads
        peaks = {
            "SDPA": BF16_PEAK,
            "all in bf16": BF16_PEAK,
            "values in bf16": 2 / (1 / INT8_PEAK + 1 / BF16_PEAK),
            "values in int8": INT8_PEAK,
        }
        best = in_turns(cases, max(3, 12 * 1024 // n))
        for name, seconds in best.items():
            peak = peaks[name.split(",")[0]]
            print(
                f"{n:7} {name:24} {seconds * 1e3:9.2f} {operations / seconds / 1e9:8.0f} "
                f"{operations / seconds / peak:8.0%} {best['SDPA, bf16'] / seconds:6.2f}"
            )


def data(kind: str, heads: int, n: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, n, size, generator=generator) for _ in range(3))
    if kind != "normal":  # a bias that all keys share, ten times as large in a few channels
        bias = torch.randn(heads, 1, size, generator=generator)
        bias[..., :: size // 4] *= 10
        k = k + 2 * bias
    if kind == "bias and outliers":  # channels of k that vary more, tokens of q that are larger
        k[..., 1 :: size // 4] *= 6
        q[..., ::37, :] *= 4
    return q.bfloat16(), k.bfloat16(), v.bfloat16()


def errors(n: int, heads: int, size: int) -> None:
    print(f"\nerror against fp64, causal, {heads} heads of {size}, {n} tokens, bf16 inputs and outputs")
    print(f"{'data':18} {'':32} {'1 - cosine':>10} {'rel. L1':>8} {'max':>8}")
    seen = torch.ones(n, n, dtype=torch.bool).tril()
    for kind in ("normal", "bias", "bias and outliers"):
        q, k, v = data(kind, heads, n, size)
        logits = (q.double() @ k.double().transpose(2, 3) / math.sqrt(size)).masked_fill(~seen, -math.inf)
        expected = torch.softmax(logits, -1) @ v.double()
        results = {"SDPA, bf16": F.scaled_dot_product_attention(q, k, v, is_causal=True)}
        results["all in bf16"] = ops.attention(q, k, v, causal=True)
        for pv, name in enumerate(("values in bf16", "values in int8")):
            for per_token, smooth in ((True, True), (False, True), (True, False)):
                label = f"{name}, {'token' if per_token else 'block'}{'' if smooth else ', not smoothed'}"
                results[label] = ops.sage_attention(q, k, v, causal=True, pv=pv, per_token=per_token, smooth_k=smooth)
        for name, result in results.items():
            off = result.double() - expected
            cosine = F.cosine_similarity(result.double().flatten(), expected.flatten(), 0)
            print(
                f"{kind:18} {name:32} {1 - cosine:10.1e} {off.abs().sum() / expected.abs().sum():8.4f} "
                f"{off.abs().max():8.4f}"
            )


def decode(lengths: list[int], heads: int, kv_heads: int, size: int) -> None:
    print(f"\ndecoding, 1 query of {heads} heads of {size}, {kv_heads} of keys and values")
    print(f"{'keys':>7} {'cache':24} {'us':>9} {'GB/s':>7} {'of 78':>6} {'ratio':>6}")
    for n in lengths:
        q = torch.randn(1, heads, 1, size).bfloat16()
        copies = max(2, -(-(96 << 20) // (2 * kv_heads * n * size)))  # beyond any cache
        plain = [[torch.randn(1, kv_heads, n, size).bfloat16() for _ in range(2)] for _ in range(copies)]
        turn = {"": 0}

        def next_of(what: list, turn: dict = turn) -> list:
            turn[""] += 1
            return what[turn[""] % len(what)]

        cases = {"bf16, SDPA": lambda q=q, p=plain: F.scaled_dot_product_attention(q, *next_of(p), enable_gqa=True)}
        cases["bf16, two products"] = lambda q=q, p=plain: single(q, *next_of(p), q.shape[-1] ** -0.5, None)
        for dtype in (torch.int8, torch.float8_e4m3fn):
            for name, scale in (("tensor", torch.tensor([0.03])), ("token", torch.ones(1, kv_heads, n))):
                caches = []
                for k, v in plain:
                    cache = [torch.zeros(1, kv_heads, n, size, dtype=torch.uint8).view(dtype) for _ in range(2)]
                    scales = [scale.clone(), scale.clone()]
                    ops.kv_append(k, v, *cache, *scales, torch.arange(n)[None])
                    caches.append([*cache, *scales])
                label = f"{'int8' if dtype is torch.int8 else 'fp8'}, scale per {name}"
                cases[label] = lambda q=q, caches=caches: ops.kv_attention(q, *next_of(caches))
        best = in_turns(cases, 30)
        for name, seconds in best.items():
            moved = 2 * kv_heads * n * (size * (2 if "bf16" in name else 1) + (4 if "token" in name else 0))
            print(
                f"{n:7} {name:24} {seconds * 1e6:9.0f} {moved / seconds / 1e9:7.1f} {moved / seconds / MEMORY:6.0%} "
                f"{best['bf16, SDPA'] / seconds:6.2f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("prefill", "errors", "decode"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--keys", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--group", type=int, default=4, help="query heads that share keys, when decoding, beside 1")
    parser.add_argument("--size", type=int, default=128, help="of a head")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ops._load.require("cpu")
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    if args.only in (None, "prefill"):
        prefill(args.tokens, args.heads, args.heads, args.size)
    if args.only in (None, "errors"):
        errors(2048, 4, args.size)
    if args.only in (None, "decode"):
        decode(args.keys, args.heads, args.heads, args.size)
        decode(args.keys, args.heads * args.group, args.heads, args.size)


if __name__ == "__main__":
    main()
