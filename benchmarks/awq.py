"""AWQ's search for a smoothing vector on the CPU: awq_search against torch's matrix products, and against forwards.

usage: python benchmarks/awq.py [--rounds N] [--candidates S] [--tokens T] [--shapes RxK ...]

Of each Linear, S candidates at 4 bit, asymmetric, groups of 128. `bf16` and `fp32` are tr(dW g dW^T) by a matmul for
each candidate, the errors dW being given. `with errors` adds what it takes to make them by the package's own ops.
`forwards` is what llm-compressor does: for each candidate the weight is rounded, and the output over T tokens is
compared with that of the weight as it was, all in bf16. Methods take turns; the best round of each is reported.
GFLOP/s count half the products of dW g, as g is symmetric: R K^2 flops a candidate.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit import ops
from quantkit.ops.isa import current_isa

SHAPES = ("1536x1024", "1024x1024", "5632x1024", "1024x2816")
GROUP = 128
HOW: dict[str, Any] = {"q_min": -8, "q_max": 7, "symmetric": False}


def rounded(w: Tensor, s: Tensor) -> Tensor:
    codes, scale, zero = ops.rtn_int(w * s, [1, GROUP], **HOW)
    return ops.dequantize(codes, scale, zero, [1, GROUP]) / s


def by_products(errors: Callable[[int], Tensor], g: Tensor, count: int) -> int:
    losses = []
    for i in range(count):
        error = errors(i)
        losses.append(((error @ g) * error).sum(dtype=torch.float32))
    return int(torch.stack(losses).argmin())


def by_forwards(w: Tensor, x: Tensor, scales: Tensor) -> int:
    wanted = F.linear(x, w)
    losses = [(F.linear(x, rounded(w, s).to(w.dtype)) - wanted).float().pow_(2).mean() for s in scales]
    return int(torch.stack(losses).argmin())


def measure(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(rounds):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            best[name] = min(best[name], time.perf_counter() - started)
    return best


def compare(rows: int, cols: int, count: int, tokens: int, rounds: int) -> None:
    torch.manual_seed(rows + cols)
    x = torch.randn(tokens, cols) + torch.randn(tokens, 8) @ torch.randn(8, cols)
    x[:, :: cols // 4] *= 30.0
    sizes, x, w = x.abs().mean(0), x.bfloat16(), (0.02 * torch.randn(rows, cols)).bfloat16()
    scales = torch.stack([sizes.pow(i / count) for i in range(count)])
    g = torch.zeros(cols, cols)
    ops.gram_accumulate(x, g)
    error, g_16 = rounded(w, scales[1]) - w, g.bfloat16()
    error_16 = error.bfloat16()

    def make(i: int) -> Tensor:
        return rounded(w, scales[i]).sub_(w)

    functions: dict[str, Callable[[], Any]] = {
        "awq_search": lambda: ops.awq_search(w, g, scales, group_size=GROUP, **HOW),
        "bf16": lambda: by_products(lambda i: error_16, g_16, count),
        "bf16 with errors": lambda: by_products(lambda i: make(i).bfloat16(), g_16, count),
        "fp32": lambda: by_products(lambda i: error, g, count),
        "fp32 with errors": lambda: by_products(make, g, count),
    }
    best = measure(functions, rounds)
    best |= measure({"forwards": lambda: by_forwards(w, x, scales)}, min(rounds, 2))  # seconds each
    ours = best.pop("awq_search")
    print(f"{rows}x{cols}: awq_search {ours * 1e3:.1f} ms, {count * rows * cols * cols / ours / 1e9:.0f} GFLOP/s")
    for name, seconds in best.items():
        print(f"  {name}: {seconds * 1e3:.1f} ms, ratio {seconds / ours:.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--candidates", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="RxK")
    args = parser.parse_args()
    print(
        f"{current_isa().name}, {torch.get_num_threads()} threads, {args.candidates} candidates, {args.tokens} tokens"
    )
    for shape in args.shapes:
        rows, cols = map(int, shape.split("x"))
        compare(rows, cols, args.candidates, args.tokens, args.rounds)


if __name__ == "__main__":
    main()
