"""Copy a checkpoint through Checkpoint and CheckpointWriter, against `cp` + fsync of the same files.

    python benchmarks/checkpoint_io.py [--gigabytes 1] [--folder DIR] [--rounds 3]

`copy` moves the tensors inside the kernel; `write` makes a new tensor of each and writes that, as with quantized
weights, but of the full size. The page cache is warm; the order of the three changes from round to round, and the best
of each is compared. Peak RSS is that of a process of its own, above its value after `import torch`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHARD_BYTES = 500_000_000


def make_checkpoint(folder: Path, nbytes: int) -> None:
    """bf16 matrices of 58.7 MB (4096 x 7168), a norm vector beside each, and an embedding of four times the size."""
    import torch

    from quantkit.checkpoint.layout import OutputTensor, plan_layout
    from quantkit.checkpoint.writer import CheckpointWriter

    rows, cols = 4096, 7168
    planned = [OutputTensor("embed", "BF16", (rows * 4, cols))]
    for layer in range(max(1, nbytes // (rows * cols * 2) - 4)):
        planned.append(OutputTensor(f"layers.{layer}.weight", "BF16", (rows, cols)))
        planned.append(OutputTensor(f"layers.{layer}.norm", "BF16", (rows,)))
    noise = torch.randint(0, 1 << 15, (rows * 4, cols), dtype=torch.int16).view(torch.bfloat16)
    with CheckpointWriter(plan_layout(planned, SHARD_BYTES), folder) as writer:
        writer.side_file("config.json", b"{}")
        for tensor in planned:
            writer.write(tensor.name, noise.flatten()[: tensor.nbytes // 2].reshape(tensor.shape))
        writer.finish()


def through_quantkit(source: Path, output: Path, kernel_copy: bool) -> None:
    from quantkit.checkpoint.layout import OutputTensor, plan_layout
    from quantkit.checkpoint.reader import Checkpoint
    from quantkit.checkpoint.writer import CheckpointWriter

    with Checkpoint(source) as checkpoint:
        tensors = [OutputTensor(i.name, i.dtype, i.shape) for i in checkpoint.tensors.values()]
        with CheckpointWriter(plan_layout(tensors, SHARD_BYTES), output) as writer:
            writer.side_file("config.json", b"{}")
            for name, info in checkpoint.tensors.items():
                if kernel_copy:
                    writer.copy(name, info, checkpoint)
                else:
                    writer.write(name, checkpoint.tensor(name).clone())
                    checkpoint.release(name)
            writer.finish()


def peak_rss() -> int:
    """VmHWM in bytes; unlike ru_maxrss it starts anew with exec."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def measure(source: Path, output: Path, kind: str) -> None:
    """In a process of its own: print seconds and peak RSS above the imports."""
    import torch  # noqa: F401 - its memory is not ours

    from quantkit import _host  # noqa: F401

    before = peak_rss()
    start = time.perf_counter()
    through_quantkit(source, output, kind == "copy")
    print(json.dumps({"seconds": time.perf_counter() - start, "rss": peak_rss() - before}))


def cp_and_fsync(source: Path, output: Path) -> float:
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, output], check=True)
    for path in (*output.iterdir(), output):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", nargs=3, metavar=("SOURCE", "OUTPUT", "KIND"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(Path(args.measure[0]), Path(args.measure[1]), args.measure[2])
        return
    seconds: dict[str, list[float]] = {"cp": [], "copy": [], "write": []}
    rss: dict[str, int] = {"copy": 0, "write": 0}
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        source, output = Path(name) / "source", Path(name) / "output"
        make_checkpoint(source, int(args.gigabytes * 1e9))
        size = sum(path.stat().st_size for path in source.iterdir())
        kinds = list(seconds)
        for _ in range(args.rounds):
            for kind in kinds:
                if kind == "cp":
                    seconds[kind].append(cp_and_fsync(source, output))
                else:
                    command = [sys.executable, __file__, "--measure", source, output, kind]
                    result = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
                    seconds[kind].append(result["seconds"])
                    rss[kind] = max(rss[kind], result["rss"])
                for path in source.glob("*.safetensors"):
                    subprocess.run(["cmp", path, output / path.name], check=True)
                shutil.rmtree(output)
            kinds.append(kinds.pop(0))
    best = {kind: min(values) for kind, values in seconds.items()}
    print(f"{size / 1e9:.2f} GB, largest tensor {4096 * 4 * 7168 * 2 / 1e6:.0f} MB, best of {args.rounds}")
    print(f"cp + fsync: {best['cp']:.2f} s, {size / best['cp'] / 1e9:.2f} GB/s")
    for kind in ("copy", "write"):
        print(
            f"{kind}: {best[kind]:.2f} s, {best[kind] / best['cp']:.2f} x cp + fsync, "
            f"peak RSS above import {rss[kind] / 1e6:.0f} MB"
        )


if __name__ == "__main__":
    main()
