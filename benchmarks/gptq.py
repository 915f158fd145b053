"""The ops of GPTQ on the CPU: Gram matrix against torch.matmul, factor and sweep against llm-compressor's.

usage: python benchmarks/gptq.py [--peer-python PATH] [--rounds N]

`--peer-python` is an interpreter with llmcompressor installed, which times its `quantize_weight` on matrices of the
same shapes (float32, 4 bit, groups of 128). The best round of each is reported.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

from quantkit import ops

SHAPES = ((1024, 1024), (1024, 2816), (4096, 4096))
PEER = """
import json, sys, time, torch
from compressed_tensors.quantization import QuantizationArgs
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
torch.set_num_threads(int(sys.argv[2]))
args = QuantizationArgs(num_bits=4, strategy="group", group_size=128, symmetric=True)
found = []
for rows, cols in json.loads(sys.argv[1]):
    x, w = torch.randn(2 * cols, cols), torch.randn(1, rows, cols)
    g = (x.T @ x / len(x)).unsqueeze(0)
    scale = w.reshape(1, rows, -1, 128).abs().amax(-1) / 7.5
    zero = torch.zeros_like(scale, dtype=torch.int8)
    best = 1e9
    for _ in range(2):
        a, b = w.clone(), g.clone()
        started = time.perf_counter()
        quantize_weight(a, b, scale, zero, None, args)
        best = min(best, time.perf_counter() - started)
    found.append(best)
print(json.dumps(found))
"""


def best(function: Callable[[], Any], rounds: int) -> float:
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    for cols in (1024, 2816, 4096):
        x, g = torch.randn(2048, cols).bfloat16(), torch.zeros(cols, cols)
        theirs = best(lambda x=x: torch.matmul(x.T, x), args.rounds)
        ours = best(lambda x=x, g=g: ops.gram_accumulate(x, g), args.rounds)
        print(f"gram 2048 x {cols}: {ours * 1e3:.2f} ms, matmul {theirs * 1e3:.2f} ms, ratio {theirs / ours:.2f}")
    peer: list[float] = []
    if args.peer_python:
        command = [args.peer_python, "-c", PEER, json.dumps(SHAPES), str(torch.get_num_threads())]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        peer = json.loads(done.stdout.splitlines()[-1])
    for i, (rows, cols) in enumerate(SHAPES):
        x, w = torch.randn(2 * cols, cols), torch.randn(rows, cols)
        g = x.T @ x
        factor = best(lambda g=g: ops.gptq_factor(g), args.rounds)
        u, _ = ops.gptq_factor(g)
        sweep = best(lambda w=w, u=u: ops.gptq_sweep(w, u, q_min=-8, q_max=7, divisor=7.5, group_size=128), args.rounds)
        line = f"{rows} x {cols}: factor {factor * 1e3:.1f} ms, sweep {sweep * 1e3:.1f} ms"
        if peer:
            line += f", llm-compressor {peer[i] * 1e3:.1f} ms, ratio {peer[i] / (factor + sweep):.2f}"
        print(line)


if __name__ == "__main__":
    main()
