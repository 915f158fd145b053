"""Accuracy of every recipe against llm-compressor's: the same model, calibration rows and windows.

usage: python benchmarks/accuracy.py --data DIR [--peer-python PATH] [--models tiny-llama tiny-moe stories260K]
           [--recipes rtn_w4a16 gptq ...] [--statistics] [--draws 0] [--windows 100]

DIR holds models/<name>, wiki_cal.txt, wikitext2.test.tokens.txt and stories260K.bin. Calibration: the first 64 rows of
256 tokens; evaluation: 100 windows of 256 tokens, no BOS: perplexity, KL(full precision || quantized) per token and
top-1 agreement, in fp32, of what either tool has written, read back by `quantkit.evaluate`. With `--client`
Transformers loads and runs it instead, where it can. With `--statistics` every recipe is also made from one calibration
of the full-precision model (`quantkit calibrate`), without errors of one layer reaching the next.

`--draws 0 1 2` calibrates three times, on rows that do not overlap (0: the first 64), `--windows` measures on more.
With --peer-python the ratio of the two tools' KL is told then, with its standard error over the draws.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from recipes import IGNORE, RECIPES
from stories import convert, told
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantkit import engine
from quantkit.calibrate import calibrate
from quantkit.calibration.dataset import text_rows
from quantkit.config.recipe_file import recipe_of
from quantkit.config.run_config import CompressionConfig, DatasetConfig, GlobalConfig, ModelConfig, RunConfig
from quantkit.evaluate import compare, open_source

PER_CHANNEL = {"w4": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "channel"}}}


def recipe_for(model: str, name: str) -> dict[str, dict[str, Any]]:
    """Groups of 128 do not fit stories260K: its weights get a scale per channel."""
    recipe = json.loads(json.dumps(RECIPES[name]))
    if model == "stories260K":
        for arguments in recipe.values():
            if str(arguments.get("scheme", "")).startswith("W4A16"):
                del arguments["scheme"], arguments["targets"]
                arguments["config_groups"] = PER_CHANNEL
    return recipe  # type: ignore[no-any-return]


def job(model: Path, recipe: dict[str, Any], rows: list[list[int]], folder: Path) -> RunConfig:
    # LLM.int8() is bitsandbytes' own.
    in_8bit = any(arguments.get("scheme") == "LLM_INT8" for arguments in recipe.values())
    save_name = "bitsandbytes" if in_8bit else None
    dataset = DatasetConfig(data_path="rows", max_seq_length=len(rows[0]), num_samples=len(rows))
    return RunConfig(
        GlobalConfig(save_path=str(folder), overwrite=True),
        ModelConfig(str(model)),
        CompressionConfig(recipe=recipe_of(recipe), save_name=save_name),
        dataset,
        source=folder,
        stem="ours",
    )


def peers(python: str, model: Path, recipe: dict[str, Any], rows: list[list[int]], folder: Path) -> Path:
    (folder / "rows.json").write_text(json.dumps(rows))
    script = Path(__file__).with_name("peer_oneshot.py")
    command = [python, str(script), str(model), str(folder / "theirs"), str(folder / "rows.json"), json.dumps(recipe)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    return folder / "theirs"


def by_client(output: Path, model: Path, windows: list[list[int]]) -> dict[str, float]:
    """What Transformers computes with it."""

    def log_probabilities(folder: Path) -> torch.Tensor:
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.inference_mode():
            return torch.cat([loaded(input_ids=part).logits.log_softmax(-1) for part in ids.split(10)])

    ids = torch.tensor(windows)
    got, reference = log_probabilities(output), log_probabilities(model)
    loss = -got[:, :-1].gather(-1, ids[:, 1:, None]).mean()
    return {
        "perplexity": math.exp(loss),
        "kl": float((reference.exp() * (reference - got)).sum(-1).mean()),
        "top1": float((got.argmax(-1) == reference.argmax(-1)).float().mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["tiny-llama", "tiny-moe", "stories260K"])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--peer-python")
    parser.add_argument("--client", action="store_true")
    parser.add_argument("--statistics", action="store_true")
    parser.add_argument("--draws", type=int, nargs="+", default=[0])
    parser.add_argument("--windows", type=int, default=100)
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, groups {IGNORE}")
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            measure(name, Path(folder), args)


def measure(name: str, folder: Path, args: argparse.Namespace) -> None:
    count = 64 * (max(args.draws) + 1)
    if name == "stories260K":
        model = convert(args.data / "stories260K.bin", folder / "model")
        drawn, windows = told(model, count, seed=1), told(model, args.windows, seed=2)
    else:
        model = args.data / "models" / name
        tokenizer = AutoTokenizer.from_pretrained(model)
        drawn = text_rows(args.data / "wiki_cal.txt", tokenizer, 256, count)
        windows = text_rows(args.data / "wikitext2.test.tokens.txt", tokenizer, 256, args.windows)
    assert len(drawn) == count and len(windows) == args.windows, f"{name}: too little text"
    draws = [drawn[64 * i : 64 * (i + 1)] for i in args.draws]
    if args.statistics:
        calibrate(job(model, recipe_for(name, "gptq"), draws[0], folder), folder / "statistics", rows=draws[0])
    for recipe in args.recipes:
        found = [results(name, model, recipe, rows, windows, folder, args) for rows in draws]
        for who in {who: 0 for one in found for who in one if len(found) > 1}:
            kls = [one[who] for one in found if who in one]
            print(f"{name:<12} {recipe:<17} {who:<15} KL {statistics.mean(kls):.5f} over {len(kls)} draws")
        both = [one for one in found if {"quantkit", "llm-compressor"} <= set(one)]
        ratios = [one["quantkit"] / one["llm-compressor"] for one in both]
        if len(ratios) > 1:
            error = statistics.stdev(ratios) / len(ratios) ** 0.5
            print(f"{name:<12} {recipe:<17} ours / theirs   {statistics.mean(ratios):.3f} +- {error:.3f}", flush=True)


def results(
    name: str,
    model: Path,
    recipe_name: str,
    rows: list[list[int]],
    windows: list[list[int]],
    folder: Path,
    args: argparse.Namespace,
) -> dict[str, float]:
    """KL by tool, of those that can do it; each is printed."""
    recipe, kls = recipe_for(name, recipe_name), {}
    for who in ["quantkit"] + ["statistics"] * args.statistics + ["llm-compressor"] * bool(args.peer_python):
        line = f"{name:<12} {recipe_name:<17} {who:<15}"
        try:
            if who == "quantkit":
                output = engine.run(job(model, recipe, rows, folder), rows=rows).output
            elif who == "statistics":
                output = engine.run(job(model, recipe, rows, folder), statistics=folder / "statistics").output
            else:
                output = peers(args.peer_python, model, recipe, rows, folder)
            if args.client:
                found = by_client(output, model, windows)
            else:
                found = compare([model, model], [open_source(output), open_source(model)], windows, progress=False)
        except Exception as error:  # a tool or a client that cannot do it is a result, too
            print(f"{line} {type(error).__name__}: {(str(error).splitlines() or ['?'])[0][:90]}", flush=True)
            continue
        kls[who] = found["kl"]
        print(f"{line} ppl {found['perplexity']:8.4f}  KL {found['kl']:.5f}  top-1 {found['top1']:.4f}", flush=True)
    return kls


if __name__ == "__main__":
    main()
