"""Prefill and decode tokens/s of a whole model: `quantkit.load` against Transformers in bf16, vLLM and llama.cpp.

usage: python benchmarks/generate.py --prepare                         # write the checkpoints, once
       python benchmarks/generate.py W4A16 bf16                         # ours and a peer, in turns
       python benchmarks/generate.py W4A16 vllm:W4A16 --vllm-python PATH
       python benchmarks/generate.py W4A16 llama:Q4_0 --llama-python PATH

The model has the shape of Llama 3.2 1B (hidden 2048, 16 layers, MLP 8192, 32 / 8 heads of 64, vocabulary 128256, head
tied to the embedding) and random weights; quantkit quantizes it without data. A contestant is `bf16` (Transformers), a
scheme
(`quantkit.load` of it; with `+head` its head is quantized to int8 as well), `vllm:SCHEME` (vLLM on the same folder) or
`llama:TYPE` (llama.cpp; its own quantizer, which stores the head in Q6_K or Q8_0). Each lives in a process of its own
and they take turns; a turn is a prompt of --prompt tokens and --tokens more, one at a time, greedy.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import generate_peers

SHAPE = {"hidden": 2048, "intermediate": 8192, "layers": 16, "heads": 32, "kv_heads": 8, "vocab": 128256}
SCHEMES = ("W4A16", "W8A8", "W4A8", "FP8_DYNAMIC")
SOURCE = "llama-1b"


def prepare(folder: Path, schemes: tuple[str, ...]) -> None:
    """The bf16 checkpoint and its quantized forms; what is there already stays."""
    from synthetic import make_llama

    from quantkit import engine
    from quantkit.config.yaml_file import load_run_config

    source = folder / SOURCE
    if not (source / "model.safetensors.index.json").exists():
        make_llama(source, tied=True, **SHAPE)
    for scheme in schemes:
        if (folder / scheme / scheme / "config.json").exists():
            continue
        yaml = folder / f"{scheme}.yaml"
        yaml.write_text(
            f"global: {{save_path: {folder / scheme}}}\n"
            f"model: {{model_path: {source}}}\n"
            f"compression: {{name: PTQ, quantization: {{scheme: {scheme}, ignore_layers: [lm_head]}}}}\n"
        )
        engine.run(load_run_config(yaml))


class Contestant:
    """A process with one model."""

    def __init__(self, name: str, folder: Path, args: argparse.Namespace) -> None:
        self.name = name
        kind, _, what = name.rpartition(":")
        python, script = sys.executable, __file__
        if kind:
            python, script = getattr(args, f"{kind}_python"), generate_peers.__file__
            if not python:
                raise SystemExit(f"{name}: give --{kind}-python")
        command = [str(python), str(script), "--serve", kind or "quantkit", what, str(folder), str(args.threads)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
        if kind:  # another interpreter, with packages of its own
            environment.pop("PYTHONPATH", None)
        self.log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment
        )
        self.prefill: list[float] = []
        self.decode: list[float] = []

    def turn(self, prompt: int, tokens: int, keep: bool) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([prompt, tokens]) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("TIMES "):
                prefill, decode = json.loads(line.removeprefix("TIMES "))
                if keep:
                    self.prefill.append(prompt / prefill)
                    self.decode.append(tokens / decode)
                return
        raise SystemExit(f"{self.name} did not run:\n" + Path(self.log.name).read_text()[-1500:])

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def serve(what: str, folder: Path, threads: int) -> None:
    """Transformers (`bf16`) or `quantkit.load`, both through `generate`."""
    import torch
    from transformers import AutoModelForCausalLM

    import quantkit
    from quantkit.runtime.generate import generate

    torch.set_num_threads(threads)
    if what == "bf16":
        model = AutoModelForCausalLM.from_pretrained(folder / SOURCE, dtype=torch.bfloat16).eval()
    else:
        scheme, _, head = what.partition("+")
        model = quantkit.load(folder / scheme / scheme)
        if head:
            quantkit.swap_linears(model, "W8A16_CHANNEL", targets="lm_head", ignore=())
    model.generation_config.eos_token_id = None

    class Tokens:
        """A tokenizer for which the prompt is token ids already."""

        def __call__(self, ids: list[int]) -> dict[str, list[int]]:
            return {"input_ids": ids}

        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return ""

    def run(ids: list[int], tokens: int) -> tuple[float, float]:
        result = generate(model, Tokens(), ids, max_new_tokens=tokens + 1)  # type: ignore[arg-type]
        assert result.new_tokens == tokens + 1
        return result.prefill_seconds, result.decode_seconds

    generate_peers.answer(run, SHAPE["vocab"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contestants", nargs="*", help="the first one is compared with each of the others")
    parser.add_argument("--prepare", action="store_true", help="write what is missing of the checkpoints, and stop")
    parser.add_argument("--schemes", default=",".join(SCHEMES), help="for --prepare")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "quantkit-generate")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vllm-python", help="an interpreter with vLLM for the CPU")
    parser.add_argument("--llama-python", help="an interpreter with llama-cpp-python and gguf")
    args = parser.parse_args()
    if args.prepare:
        prepare(args.folder, tuple(args.schemes.split(",")))
        if args.llama_python:
            script = [args.llama_python, generate_peers.__file__, "--gguf", str(args.folder / SOURCE), str(args.folder)]
            subprocess.run(script, check=True, stdout=sys.stderr)
        return
    from bench import machine

    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    running = [Contestant(name, args.folder, args) for name in args.contestants]
    for number in range(args.rounds + 1):
        for contestant in running:
            contestant.turn(args.prompt, args.tokens, keep=number > 0)
    print(f"prompt {args.prompt}, then {args.tokens} tokens; tokens/s, best and median of {args.rounds}, in turns")
    first = running[0]
    for contestant in running:
        line = f"{contestant.name:16s}"
        for what in ("prefill", "decode"):
            mine, theirs = getattr(first, what), getattr(contestant, what)
            line += f"  {what} {max(theirs):8.1f} {statistics.median(theirs):8.1f}"
            if contestant is not first:
                line += f"  {first.name} has {statistics.median(mine) / statistics.median(theirs):5.2f} x"
        print(line)
    for contestant in running:
        contestant.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[3], Path(sys.argv[4]), int(sys.argv[5]))
    else:
        main()
