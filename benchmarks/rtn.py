"""rtn_int and rtn_fp8 of a bf16 weight against copying as many bytes, and against compressed-tensors' compressors.

usage: python benchmarks/rtn.py [--rows 4096] [--cols 14336] [--threads 2] [--rounds 20] [--peer] [--cpu-time]
       [--json FILE]

The ratio is the time of a copy that reads and writes as many bytes in all as the op does, over the op's. Both are
the best of their rounds, measured in turn. The weights alternate over more than 128 MB, so none is in a cache. With
`fresh` memory the op makes its result as users call it, and is set against a copy into fresh memory and one into
memory that is there already; with `kept` memory the op's result, too, lands in memory that is there.
`--cpu-time` leaves out the time that the calling thread waits for a core: it goes with --threads 1, for machines that
others use as well. The peer (`--peer`) is compressed-tensors' own compressor, given ready scales; ours computes the
scales as well.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from bench import Timing, copies, keep_freed_memory, measure, report, start

import quantkit.ops as ops

OPS: dict[str, Callable[[torch.Tensor], Any]] = {
    "int8 channel": lambda x: ops.rtn_int(x, [1, -1], q_min=-127, q_max=127, divisor=127.0),
    "int4 g128": lambda x: ops.rtn_int(
        x, [1, 128], q_min=-8, q_max=7, divisor=7.5, scale_dtype=torch.bfloat16, pack_bits=4
    ),
    "int4 g128 asym": lambda x: ops.rtn_int(
        x, [1, 128], q_min=-8, q_max=7, symmetric=False, scale_dtype=torch.bfloat16, pack_bits=4
    ),
    "fp8 channel": lambda x: ops.rtn_fp8(x, [1, -1]),
    "fp8 block 128": lambda x: ops.rtn_fp8(x, [128, 128]),
    "fp8 tensor": lambda x: ops.rtn_fp8(x, [-1, -1]),
}


def bytes_moved(x: torch.Tensor, result: tuple[torch.Tensor, ...]) -> int:
    return sum(t.nbytes for t in (x, *result))


def peers(x: torch.Tensor) -> dict[str, Callable[[torch.Tensor], Any]]:
    """compressed-tensors' compress() of a state dict with weight, scale and zero point, for the schemes it shares."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    def peer(form: str, args: QuantizationArgs, group: int) -> Callable[[torch.Tensor], Any]:
        low, high = (t.to(x.dtype) for t in ops.minmax(x, [1, group]))
        scale, zero_point = calculate_qparams(low, high, args)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        compressor = BaseCompressor.get_value_from_registry(form)
        state = {"weight_scale": scale, "weight_zero_point": zero_point}
        return lambda weight: compressor.compress({"weight": weight, **state}, scheme)

    def channel(kind: str) -> QuantizationArgs:
        return QuantizationArgs(num_bits=8, type=kind, strategy="channel", symmetric=True)

    return {
        "int8 channel": peer("int-quantized", channel("int"), -1),
        "int4 g128": peer("pack-quantized", QuantizationArgs(num_bits=4, strategy="group", group_size=128), 128),
        "fp8 channel": peer("float-quantized", channel("float"), -1),
    }


def show(found: dict[str, Timing], names: list[str]) -> None:
    print(f"{'':18}{'min ms':>9}{'median':>9}{'GB/s':>8}   of a copy into kept memory   into fresh memory")
    for name in names:
        t = found[name]
        kept, fresh = found[f"copy:{name}"], found[f"copy fresh:{name}"]
        print(
            f"{name:18}{t.minimum * 1e3:9.2f}{t.median * 1e3:9.2f}{t.rate:8.1f}"
            f"{kept.minimum / t.minimum:20.0%} ({kept.rate:.0f} GB/s){fresh.minimum / t.minimum:14.0%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="store_true", help="measure compressed-tensors as well")
    args, clock = start(parser, rounds=20)
    generator = torch.Generator().manual_seed(0)
    size = (args.rows, args.cols)
    one = torch.randn(size, generator=generator, dtype=torch.float32).to(torch.bfloat16)
    weights = [one] + [one.clone() for _ in range(max(1, -(-(128 << 20) // one.nbytes)))]
    print(f"bf16 {args.rows} x {args.cols}, {len(weights)} weights in turn, {args.rounds} rounds")

    names = list(OPS)
    moved = {name: bytes_moved(one, op(one)) for name, op in OPS.items()}
    timings: list[Timing] = []

    def run(memory: str) -> None:
        cases = {name: (moved[name], lambda i, op=op: op(weights[i % len(weights)])) for name, op in OPS.items()}
        found = measure({**cases, **copies(moved)}, memory, args.rounds, clock=clock)
        timings.extend(found.values())
        print(f"\n{memory} memory for results")
        show(found, names)

    run("fresh")
    if args.peer:
        print("\ncompressed-tensors' compressor, scales given")
        for name, compress in peers(one).items():
            cases = {
                f"peer {name}": (moved[name], lambda i, f=compress: f(weights[i % len(weights)])),
                name: (moved[name], lambda i, f=OPS[name]: f(weights[i % len(weights)])),
            }
            found = measure(cases, "fresh", max(3, args.rounds // 5), warmup=1, clock=clock)
            timings.append(found[f"peer {name}"])
            theirs, ours = found[f"peer {name}"].minimum, found[name].minimum
            print(f"{name:18}{theirs * 1e3:9.1f} ms, quantkit {ours * 1e3:.2f} ms: {theirs / ours:.0f} x")
    if keep_freed_memory():
        run("kept")
    report(timings, args.json, rows=args.rows, cols=args.cols)


if __name__ == "__main__":
    main()
