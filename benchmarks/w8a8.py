"""W8A8: bf16 in, bf16 out, int8 per token in between, against oneDNN's int8 Linear as torch offers it, in turns.

The peer is `torch.ops.onednn.qlinear_pointwise` (u8 activations, s8 weights prepacked), which takes one scale for all
rows. What it lacks for a scale per token is given to it in the fastest way at hand: quantkit's own per-token op, one
pass in place that makes the codes unsigned, and one multiplication by the scales in place, in bf16. `raw` is the
integer product alone: `int8_gemm` to int32 against the peer's call to fp32, both from codes that are there already.

With --mixed: what the outliers of int8_mixed_gemm cost. One column in 200 is an outlier; beside it w8a8_gemm without
them, torch's bf16 Linear, and LLM.int8() in stock torch ops around the peer above: finding the columns, taking them
out, the same int8 product, and a bf16 product with dequantized weight columns that are there already.

Cold: more than 128 MB of distinct weights in turn, so that none is in a cache. Warm: the same weight again and again.
Peaks are those of 2 Zen 5 cores: 2.05 TOPS of vpdpbusd, 78 GB/s of DRAM; give your own with --tops and --gbs. "% peak"
is the larger share of the two, by the median. Ratios are the peer's median over ours.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from bench import LIMITS, keep_freed_memory, limit_isa, machine

from quantkit import ops
from quantkit.ops.isa import current_isa

SHAPES = ("4096x4096", "14336x4096", "4096x14336", "2048x2048", "8192x2048", "2048x8192")
ROWS = (1, 4, 16, 64, 256, 1024)
COLD_BYTES = 136 << 20
Call = Callable[[int], Any]


def cases(m: int, codes: torch.Tensor, scale: torch.Tensor, ours: list[Any], theirs: list[Any]) -> dict[str, Call]:
    n, k = codes.shape
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).bfloat16()
    q = ops.int8_quant_per_token(x)[0]
    u, zeros = q.view(torch.uint8) ^ 128, torch.zeros(n, dtype=torch.int32)
    linear, turns = torch.ops.onednn.qlinear_pointwise, len(ours)

    def peer(i: int) -> torch.Tensor:
        code, step, _ = ops.int8_quant_per_token(x)
        unsigned = code.view(torch.uint8).bitwise_xor_(128)
        weight = theirs[i % turns]
        y = linear(unsigned, 1.0, 128, weight, scale, zeros, None, 1.0, 0, torch.bfloat16, "none", [], "")
        return y.mul_(step)

    def later(i: int) -> int:  # not what was read just before
        return (i + turns // 2) % turns

    def peer_raw(i: int) -> torch.Tensor:
        return linear(u, 1.0, 128, theirs[later(i)], scale, zeros, None, 1.0, 0, torch.float32, "none", [], "")

    found: dict[str, Call] = {
        "ours": lambda i: ops.w8a8_gemm(x, ours[i % turns], scale, n),
        "peer": peer,
        "ours raw": lambda i: ops.int8_gemm(q, ours[later(i)], n),
        "peer raw": peer_raw,
    }
    mine, other = found["ours"](0).float(), peer(0).float()
    assert (mine - other).norm() < 0.01 * other.norm()
    if not torch.allclose(found["ours raw"](0) * scale, peer_raw(0), rtol=1e-4, atol=1e-2):
        assert current_isa().name != "avx512"
        print("  the peer's sums are off: without VNNI it adds pairs of products in 16 bits, which saturate")
    return found


def mixed_cases(
    m: int, codes: torch.Tensor, scale: torch.Tensor, ours: list[Any], theirs: list[Any]
) -> dict[str, Call]:
    n, k = codes.shape
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).clamp(-5, 5).bfloat16()
    x[0, ::200] = 20.0
    plain, turns, zeros = (codes * scale[:, None]).bfloat16(), len(ours), torch.zeros(n, dtype=torch.int32)
    dense, columns = [plain.clone() for _ in range(turns)], plain[:, ::200].contiguous()
    linear = torch.ops.onednn.qlinear_pointwise

    def peer(i: int) -> torch.Tensor:
        outliers = (x.abs() >= 6.0).any(0).nonzero()[:, 0]
        code, step, _ = ops.int8_quant_per_token(x.index_fill(1, outliers, 0.0))
        unsigned, weight = code.view(torch.uint8).bitwise_xor_(128), theirs[i % turns]
        y = linear(unsigned, 1.0, 128, weight, scale, zeros, None, 1.0, 0, torch.bfloat16, "none", [], "").mul_(step)
        return y.addmm_(x[:, outliers], columns.T)

    found: dict[str, Call] = {
        "mixed": lambda i: ops.int8_mixed_gemm(x, ours[i % turns], scale, n),
        "peer": peer,
        "w8a8": lambda i: ops.w8a8_gemm(x, ours[(i + turns // 2) % turns], scale, n),
        "bf16": lambda i: torch.nn.functional.linear(x, dense[i % turns]),
    }
    mine, other = found["mixed"](0).float(), peer(0).float()
    assert (mine - other).norm() < 0.01 * other.norm()
    return found


def measure(found: dict[str, Call], warm: bool, seconds: float) -> dict[str, list[float]]:
    """Every case in turn, round by round; warm: three calls in a row after one that counts for nothing."""
    taken: dict[str, list[float]] = {name: [] for name in found}
    repeats, i, end = (3 if warm else 1), 0, time.perf_counter() + seconds
    while time.perf_counter() < end or i < 8:
        for name, call in found.items():
            if warm:
                call(0)
            for _ in range(repeats):
                started = time.perf_counter()
                result = call(0 if warm else i)
                taken[name].append(time.perf_counter() - started)
                del result
        i += 1
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=SHAPES, help="N x K")
    parser.add_argument("--rows", nargs="*", type=int, default=ROWS, help="M")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each line of the table")
    parser.add_argument("--only", choices=("cold", "warm"))
    parser.add_argument("--mixed", action="store_true", help="int8_mixed_gemm instead")
    parser.add_argument("--kept", action="store_true", help="results in memory that is there already, see bench.py")
    parser.add_argument("--tops", type=float, default=2.05)
    parser.add_argument("--gbs", type=float, default=78.0)
    parser.add_argument("--isa", choices=tuple(LIMITS), help="the most that ours and torch may use")
    args = parser.parse_args()
    limit_isa(args.isa)
    torch.set_num_threads(args.threads)
    ops._load.require("cpu")
    memory = "kept" if args.kept and keep_freed_memory() else "fresh"
    print(", ".join(f"{key} {value}" for key, value in machine().items()), f"{memory} memory", sep=", ")
    head = (
        f"{'N x K':12}{'M':>5} {'':5}{'ours us':>9}{'min':>8}{'GOPS':>7}{'GB/s':>6}{'% peak':>7}{'peer us':>9}"
        f"{'min':>8}{'GOPS':>7}{'ratio':>7} | raw{'ours us':>8}{'GOPS':>7}{'peer us':>9}{'GOPS':>7}{'ratio':>7}"
    )
    print("microseconds: median (minimum)" if args.mixed else head)
    for shape in args.shapes:
        n, k = map(int, shape.split("x"))
        generator = torch.Generator().manual_seed(0)
        codes = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
        scale = torch.rand(n, generator=generator) / 100 + 0.001
        count = -(-COLD_BYTES // (n * k))
        ours = [ops.pack_w8a8(codes) for _ in range(count)]
        theirs = [torch.ops.onednn.qlinear_prepack(codes, None) for _ in range(count)]
        for m in args.rows:
            found = (mixed_cases if args.mixed else cases)(m, codes, scale, ours, theirs)
            for regime in ("cold", "warm"):
                if args.only not in (None, regime):
                    continue
                taken = measure(found, regime == "warm", args.seconds)
                t = {name: statistics.median(values) for name, values in taken.items()}
                low = {name: min(values) for name, values in taken.items()}
                if args.mixed:
                    figures = "  ".join(f"{name} {t[name] * 1e6:.0f} ({low[name] * 1e6:.0f})" for name in t)
                    ratios = ", ".join(f"{name} / mixed {t[name] / t['mixed']:.2f}" for name in list(t)[1:])
                    print(f"{shape:12}{m:5} {regime:5} {figures}: {ratios}", flush=True)
                    continue
                work, moved = 2 * m * n * k / 1e9, (n * k + 2 * m * (n + k)) / 1e9
                share = max(work / t["ours"] / args.tops / 1e3, moved / t["ours"] / args.gbs)
                print(
                    f"{shape:12}{m:5} {regime:5}{t['ours'] * 1e6:9.0f}{low['ours'] * 1e6:8.0f}{work / t['ours']:7.0f}"
                    f"{moved / t['ours']:6.0f}{share:7.0%}{t['peer'] * 1e6:9.0f}{low['peer'] * 1e6:8.0f}"
                    f"{work / t['peer']:7.0f}{t['peer'] / t['ours']:7.2f} |    {t['ours raw'] * 1e6:8.0f}"
                    f"{work / t['ours raw']:7.0f}{t['peer raw'] * 1e6:9.0f}{work / t['peer raw']:7.0f}"
                    f"{t['peer raw'] / t['ours raw']:7.2f}",
                    flush=True,
                )
        del ours, theirs


if __name__ == "__main__":
    main()
