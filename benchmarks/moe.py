"""moe_gemm on the CPU: the gate, up and down Linears of a layer of experts, for tokens routed at random.

    python benchmarks/moe.py --experts 64 --hidden 2048 --intermediate 768 --top 8 --tokens 1 16 256

Of a layer of the given shape (Qwen3-MoE's by default) the two weights are timed: gate and up as one, [2 * intermediate,
hidden], and down [hidden, intermediate]. `calls`: the single op once for each expert that has tokens; `bf16`: F.linear
once for each, as Transformers does on weights in bf16. Sorting and combining the tokens is outside of all three.
GB/s counts the packed weights of the experts that have tokens.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from bench import measure, report, start
from torch import Tensor

from quantkit import ops

KINDS = ("w8a8", "w4a8", "w4a16", "w8a16", "fp8", "fp8 block")


def weights(kind: str, experts: int, rows: int, cols: int) -> dict[str, Any]:
    """Arguments of moe_gemm but x and offsets, random."""
    if kind.startswith("fp8"):
        block, how = ([128, 128], [1, 128]) if "block" in kind else ([1, -1], [1, -1])
        codes = [ops.rtn_fp8(torch.randn(rows, cols), block) for _ in range(experts)]
        packed, scale = [ops.pack_fp8(c) for c, _ in codes], torch.stack([s for _, s in codes])
        return {"packed": torch.stack(packed), "weight_scale": scale, "weight_block": block, "input_block": how}
    bits = int(kind[1])
    codes8 = torch.randint(-7, 8, (experts, rows, cols), dtype=torch.int8)
    if kind == "w8a8":
        return {
            "packed": torch.stack([ops.pack_w8a8(c) for c in codes8]),
            "weight_scale": torch.full((experts, rows), 0.01),
        }
    scale = torch.full((experts, rows, cols // 128), 0.01)
    words = [ops.pack_int32(c, bits) for c in codes8]
    if kind == "w4a8":
        packed = [ops.pack_w4a8(w, cols) for w in words]
        scale = torch.stack([ops.pack_w4a8_scales(s) for s in scale])
        return {"packed": torch.stack(packed), "weight_scale": scale, "group_size": 128}
    packed = [ops.pack_wna16(w, bits, cols) for w in words]
    scale = torch.stack([ops.pack_wna16_scales(s) for s in scale])
    return {"packed": torch.stack(packed), "weight_scale": scale, "num_bits": bits, "group_size": 128}


def single(kind: str, x: Tensor, values: dict[str, Any], e: int, rows: int) -> Tensor:
    packed, scale = values["packed"][e], values["weight_scale"][e]
    if kind == "w8a8":
        return ops.w8a8_gemm(x, packed, scale, rows)
    if kind == "w4a8":
        return ops.w4a8_gemm(x, packed, scale, rows, 128)
    if kind in ("w4a16", "w8a16"):
        return ops.wna16_gemm(x, packed, scale, values["num_bits"], rows, 128)
    return ops.fp8_gemm(x, packed, scale, values["weight_block"], rows, input_block=values["input_block"])


def cases(
    args: argparse.Namespace, name: str, tokens: int, dense: Tensor, kinds: dict[str, dict[str, Any]]
) -> dict[str, tuple[int, Callable[[int], Any]]]:
    """Every round and every case routes the tokens anew: no case finds its weights in the cache because the one before
    it read them.
    """
    _, rows, cols = dense.shape
    routed = []
    for _ in range(32):
        choices = torch.stack([torch.randperm(args.experts)[: args.top] for _ in range(tokens)])
        _, offsets = ops.sort_by_expert(choices, args.experts)
        routed.append((offsets, offsets.tolist()))
    x = torch.randn(tokens * args.top, cols).bfloat16()
    used = sum(sum(a < b for a, b in itertools.pairwise(r)) for _, r in routed) / len(routed)

    def loop(i: int, call: Callable[[Tensor, int], Tensor]) -> Tensor:
        i += 13
        y, bounds = x.new_empty((len(x), rows)), routed[i % len(routed)][1]
        for e in range(args.experts):
            if bounds[e] < bounds[e + 1]:
                y[bounds[e] : bounds[e + 1]] = call(x[bounds[e] : bounds[e + 1]], e)
        return y

    made: dict[str, tuple[int, Callable[[int], Any]]] = {
        f"{name} bf16": (
            int(used * rows * cols * 2),
            lambda i: loop(i, lambda part, e: F.linear(part, dense[e])),
        )
    }
    for kind, values in kinds.items():
        how = {k: v for k, v in values.items() if k not in ("packed", "weight_scale")}
        op = "wna16" if kind in ("w4a16", "w8a16") else kind.split()[0]
        moved = int(used * values["packed"][0].numel() * values["packed"].element_size())
        made[f"{name} {kind}"] = (
            moved,
            lambda i, op=op, values=values, how=how: ops.moe_gemm(
                op, x, routed[i % len(routed)][0], values["packed"], values["weight_scale"], rows, **how
            ),
        )
        made[f"{name} {kind} calls"] = (
            moved,
            lambda i, kind=kind, values=values: loop(i, lambda part, e: single(kind, part, values, e, rows)),
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--top", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    args, clock = start(parser, 12)
    timings = []
    shapes = {"gate_up": (2 * args.intermediate, args.hidden), "down": (args.hidden, args.intermediate)}
    for name, (rows, cols) in shapes.items():
        dense = torch.randn(args.experts, rows, cols).bfloat16()
        kinds = {kind: weights(kind, args.experts, rows, cols) for kind in args.kinds}
        for tokens in args.tokens:
            made = cases(args, name, tokens, dense, kinds)
            measured = measure(made, "cold", args.rounds * 3 if tokens < 64 else args.rounds // 2, clock=clock)
            peer = measured[f"{name} bf16"]
            print(f"\n{args.experts} experts {rows} x {cols}, top {args.top}, {tokens} tokens")
            print("  least, median ms; GB/s; GFLOP/s; times faster than bf16 and than single calls (medians)")
            for case, timing in measured.items():
                flops = 2 * tokens * args.top * rows * cols / timing.minimum / 1e9
                line = (
                    f"  {case:<24}{timing.minimum * 1e3:9.3f}{timing.median * 1e3:9.3f}{timing.rate:8.1f}{flops:9.1f}"
                )
                line += f"{peer.median / timing.median:7.2f}"
                if f"{case} calls" in measured:
                    line += f"{measured[f'{case} calls'].median / timing.median:7.2f}"
                print(line)
                timings.append(timing)
    report(timings, args.json)


if __name__ == "__main__":
    main()
