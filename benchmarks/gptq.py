"""The ops of GPTQ on the CPU: Gram matrix against torch.matmul, factor and sweep against llm-compressor's.

usage: python benchmarks/gptq.py [--peer-python PATH] [--rounds N]

`--peer-python` is an interpreter with llmcompressor installed. It times its `quantize_weight` on matrices of the same
shapes (float32, 4 bit, groups of 128) in turns with ours, one call each. Best and median of the rounds are reported;
ratios are of the best.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import time
from collections.abc import Callable
from statistics import median
from typing import IO, Any

import torch
from torch import Tensor

from quantkit import ops

GRAMS = ((16384, 1024), (2048, 1024), (2048, 2816), (2048, 4096))
SHAPES = ((1024, 1024), (1024, 2816), (4096, 4096))
EXPERTS = (8, 768, 2048)
SWEEP: dict[str, Any] = {"q_min": -8, "q_max": 7, "divisor": 7.5, "group_size": 128}
SEARCH: dict[str, Any] = {"search_range": 0.25, "search_steps": 5, "signs": True}  # what GPTQModifier asks for
# Answers each line [rows, cols] on its input with the seconds of one call.
PEER = """
import json, sys, time, torch
from compressed_tensors.quantization import QuantizationArgs
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
torch.set_num_threads(int(sys.argv[1]))
args = QuantizationArgs(num_bits=4, strategy="group", group_size=128, symmetric=True)
problems = {}
for line in sys.stdin:
    rows, cols = json.loads(line)
    if (rows, cols) not in problems:
        x, w = torch.randn(2 * cols, cols), torch.randn(1, rows, cols)
        scale = w.reshape(1, rows, -1, 128).abs().amax(-1) / 7.5
        problems = {(rows, cols): (w, (x.T @ x / len(x)).unsqueeze(0), scale)}
    w, g, scale = problems[rows, cols]
    w, g, zero = w.clone(), g.clone(), torch.zeros_like(scale, dtype=torch.int8)
    started = time.perf_counter()
    quantize_weight(w, g, scale, zero, None, args)
    print(json.dumps(time.perf_counter() - started), flush=True)
"""
PAUSE = 0.1
Timer = Callable[[], float]


def seconds(function: Callable[[], Any]) -> Timer:
    def timed() -> float:
        started = time.perf_counter()
        function()
        return time.perf_counter() - started

    return timed


def in_turns(rounds: int, **timers: Timer) -> dict[str, list[float]]:
    """Milliseconds of each timer, one call after the other in each round, after one that does not count.

    Each begins when the threads of the one before, here and in the peer, have gone to sleep: they spin for a while,
    which costs whoever comes next many milliseconds.
    """
    found: dict[str, list[float]] = {name: [] for name in timers}
    for i in range(rounds + 1):
        for name, timer in timers.items():
            time.sleep(PAUSE)
            taken = timer() * 1e3
            if i:
                found[name].append(taken)
    return found


def report(title: str, found: dict[str, list[float]]) -> None:
    shown = [f"{name} {min(taken):.2f} ms (median {median(taken):.2f})" for name, taken in found.items()]
    print(f"{title}: {', '.join(shown)}", flush=True)


class Peer:
    def __init__(self, python: str) -> None:
        command = [python, "-c", PEER, str(torch.get_num_threads())]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def timer(self, rows: int, cols: int) -> Timer:
        def timed() -> float:
            asked, answers = self.process.stdin, self.process.stdout
            assert asked is not None
            assert answers is not None
            print(json.dumps([rows, cols]), file=asked, flush=True)
            return self.answer(answers)

        return timed

    def answer(self, answers: IO[str]) -> float:
        for line in answers:  # the peer may print other lines first
            try:
                return float(line)
            except ValueError:
                continue
        raise RuntimeError("the peer has ended: see its messages above")

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


def gram(tokens: int, cols: int, rounds: int) -> None:
    x, g, channels = torch.randn(tokens, cols).bfloat16(), torch.zeros(cols, cols), torch.zeros(3, cols)
    found = in_turns(
        rounds,
        ours=seconds(lambda: ops.gram_accumulate(x, g)),
        matmul=seconds(lambda: torch.matmul(x.T, x)),
        channels=seconds(lambda: ops.gram_accumulate(x, g, channels=channels)),
    )
    report(f"gram {tokens} x {cols}", found)
    print(f"  ratio {min(found['matmul']) / min(found['ours']):.2f}", flush=True)


def machine() -> None:
    """How fast the machine is at the moment."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(4096, 4096).to(dtype)
        taken = in_turns(3, matmul=seconds(functools.partial(torch.matmul, x, x)))["matmul"]
        print(f"torch.matmul 4096^3 {dtype}: {2 * 4096**3 / min(taken) / 1e6:.0f} GFLOP/s", flush=True)


def gram_of(cols: int) -> Tensor:
    x = torch.randn(2 * cols, cols)
    return x.T @ x


def one_weight(rows: int, cols: int, rounds: int, peer: Peer | None) -> None:
    w, g = torch.randn(rows, cols), gram_of(cols)
    factor, _ = ops.gptq_factor(g)
    timers = {
        "factor": seconds(lambda: ops.gptq_factor(g)),
        "sweep": seconds(lambda: ops.gptq_sweep(w, factor, **SWEEP)),
        "with search": seconds(lambda: ops.gptq_sweep(w, factor, **SWEEP, **SEARCH)),
    }
    if peer:
        timers["llm-compressor"] = peer.timer(rows, cols)
    found = in_turns(rounds, **timers)
    report(f"gptq {rows} x {cols}", found)
    if peer:
        least = {name: min(taken) for name, taken in found.items()}
        ratios = [least["llm-compressor"] / (least["factor"] + least[name]) for name in ("sweep", "with search")]
        print(f"  ratio of factor + sweep {ratios[0]:.2f}, with search {ratios[1]:.2f}", flush=True)


def experts(count: int, rows: int, cols: int, rounds: int) -> None:
    w, g = torch.randn(count, rows, cols), torch.stack([gram_of(cols) for _ in range(count)])
    factor, _ = ops.gptq_factor(g)
    found = in_turns(
        rounds,
        **{
            "factors": seconds(lambda: ops.gptq_factor(g)),
            "factors one by one": seconds(lambda: [ops.gptq_factor(one) for one in g]),
            "sweeps": seconds(lambda: ops.gptq_sweep(w, factor, **SWEEP)),
            "sweeps one by one": seconds(
                lambda: [ops.gptq_sweep(*one, **SWEEP) for one in zip(w, factor, strict=True)]
            ),
        },
    )
    report(f"{count} experts {rows} x {cols}", found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    machine()
    for tokens, cols in GRAMS:
        gram(tokens, cols, args.rounds)
    peer = Peer(args.peer_python) if args.peer_python else None
    try:
        for rows, cols in SHAPES:
            one_weight(rows, cols, args.rounds, peer)
    finally:
        if peer:
            peer.close()
    experts(*EXPERTS, args.rounds)


if __name__ == "__main__":
    main()
