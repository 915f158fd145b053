"""Two processes with one thread each against one process with one thread: calibration and GPTQ of random models.

    python benchmarks/ranks.py [--dense | --experts] [--ranks 2] [--repeat 2]

One and many take turns. Seconds are those of the layers (without start, plan and audit); CPU seconds are what each
process's main thread worked, without waiting for others. All outputs are compared, byte for byte.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

DENSE = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 4096,
    "max_position_embeddings": 512,
}
EXPERTS = {
    **DENSE,
    "num_hidden_layers": 2,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 384,
    "head_dim": 64,
}
ROWS, LENGTH = 64, 512
TEXT = Path(__file__).resolve().parent.parent / "examples" / "data" / "calibration.jsonl"  # not read: rows are random

CHILD = """
import json, sys, time, random
from quantkit import distributed, engine
from quantkit.config.yaml_file import load_run_config
usual, spent = engine.calibrate, {}
def calibrate(*args, **kwargs):
    distributed.ranks().barrier()
    wall, cpu = time.perf_counter(), time.thread_time()
    try:
        return usual(*args, **kwargs)
    finally:
        spent.update(seconds=time.perf_counter() - wall, cpu=time.thread_time() - cpu)
engine.calibrate = calibrate
count, length, vocabulary = map(int, sys.argv[2:5])
draw = random.Random(0)
rows = [[draw.randrange(vocabulary) for _ in range(length)] for _ in range(count)]
assert engine.run(load_run_config(sys.argv[1]), rows=rows, progress=False).audit.ok
print(json.dumps(spent))
"""


def make(folder: Path, kind: str, sizes: dict[str, int]) -> None:
    """A random bf16 model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **sizes, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def run(model: Path, sizes: dict[str, int], folder: Path, ranks: int) -> list[dict[str, float]]:
    """What each rank spent."""
    folder.mkdir()
    job = folder / "job.yaml"
    job.write_text(
        f"global: {{save_path: {folder}}}\nmodel: {{model_path: {model}}}\n"
        "compression: {recipe: {quant_stage: {quant_modifiers: {GPTQModifier: {scheme: W4A16, ignore: [lm_head]}}}}}\n"
        f"dataset: {{data_path: {TEXT}, num_samples: 64, max_seq_length: 512}}\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    common: dict[str, str] = {**os.environ, "OMP_NUM_THREADS": "1"}
    if ranks > 1:
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    rows = [str(ROWS), str(LENGTH), str(sizes["vocab_size"])]
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(job), *rows],
            env=common | ({"RANK": str(rank)} if ranks > 1 else {}),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    spent = []
    for child in children:
        out, _ = child.communicate()
        assert child.returncode == 0
        spent.append(json.loads(out.splitlines()[-1]))
    return spent


def measure(what: str, kind: str, sizes: dict[str, int], ranks: int, repeat: int) -> None:
    """Prints the seconds of one and of many ranks, in turns."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder / "model", kind, sizes)
        best: dict[int, Any] = {}
        for turn in range(repeat):
            for n in (1, ranks):
                spent = run(folder / "model", sizes, folder / f"{n}-{turn}", n)
                seconds = max(s["seconds"] for s in spent)
                cpu = ", ".join(f"{s['cpu']:.2f}" for s in spent)
                print(f"{what}: {n} rank{'s' if n > 1 else ''}: {seconds:.2f} s; CPU seconds by rank {cpu}", flush=True)
                if n not in best or seconds < best[n][0]:
                    best[n] = (seconds, [s["cpu"] for s in spent])
        for one in sorted((folder / "1-0" / "job").iterdir()):
            for n in (1, ranks):
                for turn in range(repeat):
                    assert one.read_bytes() == (folder / f"{n}-{turn}" / "job" / one.name).read_bytes(), one.name
        work = best[ranks][1]
        print(
            f"{what}: {ranks} ranks {best[1][0] / best[ranks][0]:.2f} times as fast as one; the busiest works "
            f"{100 * (max(work) / (sum(work) / len(work)) - 1):.1f}% more than the mean; all files the same"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dense", action="store_true", help="only the dense model")
    parser.add_argument("--experts", action="store_true", help="only the model with 64 experts a layer")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=2)
    args = parser.parse_args()
    if not args.experts:
        measure("Llama, 1024 wide, 4 layers, 64 x 512 tokens", "llama", DENSE, args.ranks, args.repeat)
    if not args.dense:
        measure("64 experts, 1024 wide, 2 layers, 64 x 512 tokens", "qwen3_moe", EXPERTS, args.ranks, args.repeat)


if __name__ == "__main__":
    main()
