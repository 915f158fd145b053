"""fp8_gemm on the CPU against F.linear in bf16 on the dequantized weight, and torch._scaled_mm where it runs.

    python benchmarks/fp8_gemm.py --rows 4096 --cols 4096 --tokens 1 16 256

Three ways of ours: `w8a16` x as it is, bf16, a scale per channel; `token` x quantized per token; `block` weights with a
scale for each 128 x 128, x one for each 128 columns. Cold: as many copies of the weight as four times the L3 cache
takes, in turn; warm: one. Quantizing x is part of the time, packing the weight is not.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from bench import measure, report, start
from torch import Tensor

from quantkit import ops

COLD_BYTES = 128 << 20  # four times the L3 cache
PEAK_FLOPS, PEAK_BYTES = 0.98e12, 78e9  # of two cores of the machine that the figures of docs/benchmarks.md are from
E4M3 = torch.float8_e4m3fn


def cases(rows: int, cols: int, tokens: int, copies: int, peers: bool) -> dict[str, tuple[int, Callable[[int], Any]]]:
    weight = torch.randn(rows, cols) * 0.02
    x = torch.randn(tokens, cols).bfloat16()
    channel, channel_scale = ops.rtn_fp8(weight, [1, -1])
    block, block_scale = ops.rtn_fp8(weight, [128, 128])
    dense = [ops.dequantize(channel, channel_scale, None, [1, -1], torch.bfloat16) for _ in range(copies)]
    by_channel = [ops.pack_fp8(channel) for _ in range(copies)]
    by_block = [ops.pack_fp8(block) for _ in range(copies)]
    read = rows * cols

    def ours(
        packed: list[Tensor], scale: Tensor, size: list[int], how: list[int] | None, first: int = 0
    ) -> Callable[[int], Any]:
        return lambda i: ops.fp8_gemm(x, packed[(i + first) % copies], scale, size, rows, input_block=how)

    made: dict[str, tuple[int, Callable[[int], Any]]] = {
        "F.linear bf16": (2 * read, lambda i: F.linear(x, dense[i % copies])),
        "w8a16": (read, ours(by_channel, channel_scale, [1, -1], None)),
        # Not the copy that was just read.
        "token": (read, ours(by_channel, channel_scale, [1, -1], [1, -1], copies // 2)),
        "block": (read, ours(by_block, block_scale, [128, 128], [1, 128])),
    }
    if peers:
        one = torch.ones(1)
        codes, scale = ops.rtn_fp8(weight, [-1, -1])
        stored = [codes.clone() for _ in range(copies)]

        def scaled_mm(i: int) -> Tensor:
            a, a_scale = ops.rtn_fp8(x, [-1, -1])
            result: Tensor = torch._scaled_mm(
                a, stored[i % copies].T, scale_a=a_scale * one, scale_b=scale, out_dtype=torch.bfloat16
            )
            return result

        made["torch._scaled_mm"] = (read, scaled_mm)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024])
    parser.add_argument("--memory", choices=["cold", "warm", "both"], default="both")
    parser.add_argument("--peers", action="store_true", help="torch._scaled_mm too, which is slow on most CPUs")
    args, clock = start(parser, 15)
    timings = []
    for memory in ("cold", "warm") if args.memory == "both" else (args.memory,):
        for tokens in args.tokens:
            # Beyond some rows the weight is a small part of what is moved.
            copies = 1 if memory == "warm" or tokens > 64 else COLD_BYTES // (args.rows * args.cols) + 1
            made = cases(args.rows, args.cols, tokens, copies, args.peers)
            rounds = max(5, min(args.rounds * 4, int(args.rounds * 64 / tokens)))
            measured = measure(made, memory, rounds, clock=clock)
            peer = measured["F.linear bf16"]
            print(
                f"\n{memory} {args.rows} x {args.cols}, {tokens} tokens: ms least/median, GB/s, GFLOP/s, of peak, ratio"
            )
            for name, timing in measured.items():
                flops = 2 * tokens * args.rows * args.cols / timing.minimum
                share = max(flops / PEAK_FLOPS, timing.rate * 1e9 / PEAK_BYTES)
                ratios = (peer.minimum / timing.minimum, peer.median / timing.median)
                print(
                    f"  {name:<17}{timing.minimum * 1e3:9.3f}{timing.median * 1e3:9.3f}{timing.rate:8.1f}"
                    f"{flops / 1e9:9.1f}{share:7.0%}{ratios[0]:7.2f}{ratios[1]:7.2f}"
                )
                timings.append(timing)
    report(timings, args.json)


if __name__ == "__main__":
    main()
