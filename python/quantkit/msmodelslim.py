"""`quantkit msmodelslim`: the command line of Ascend's convert_quant_weights.py, over quantkit's own engine.

Options and defaults are those of MindIE-LLM's examples/convert/model_slim/quantifier.py; booleans are the words True
and False. What quantkit does otherwise, or not at all, is an error that says so, and options without effect are told.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint.hub import resolve_model
from .checkpoint.reader import Checkpoint
from .config.recipe import AWQModifier, Modifier, QuantizationModifier, Recipe, SmoothQuantModifier
from .config.run_config import CompressionConfig, DatasetConfig, GlobalConfig, ModelConfig, RunConfig
from .config.schemes import QuantizationArgs
from .errors import ConfigError

# --act_method: how ranges of static inputs are found.
OBSERVERS = {1: "minmax", 2: "mse", 3: "auto"}
ANTI_METHODS = ("", "m1", "m3")
# (w_bit, a_bit, is_dynamic) -> scheme
SCHEMES = {
    (8, 8, False): "W8A8_STATIC_ASYM",
    (8, 8, True): "W8A8",
    (8, 16, False): "W8A16_CHANNEL",
    (8, 16, True): "W8A16_CHANNEL",
}
EXPERTS = "re:.*\\.experts\\..*"
# Options that change nothing here, and what they are there.
IDLE = ("fraction", "mm_tensor", "open_outlier", "group_size", "tp_size", "input_ids_name", "attention_mask_name")
# Options that would change the result, with the only value that quantkit has.
ONLY: dict[str, Any] = {
    "co_sparse": False,
    "is_lowbit": False,
    "do_smooth": False,
    "use_sigma": False,
    "use_fa_quant": False,
    "use_reduce_quant": False,
    "w_sym": True,
    "disable_last_linear": True,
    "device_type": "cpu",
}


def boolean(word: str) -> bool:
    """The literal words True and False, in any case."""
    if word.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"'{word}'; write True or False")
    return word.lower() == "true"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of that script, and `--overwrite`."""
    add = parser.add_argument
    add("--model_path", required=True, metavar="PATH", help="the full-precision model, in bfloat16 or float16")
    add("--save_directory", required=True, metavar="DIR", help="the output folder")
    add("--part_file_size", type=float, metavar="GB", help="largest weight file (default: all in one)")
    add("--calib_texts", nargs="*", metavar="TEXT", help="calibration texts")
    add(
        "--calib_file",
        metavar="FILE",
        help="JSON lines with inputs_pretokenized (boolq.jsonl), or any data of quantkit",
    )
    add("--w_bit", type=int, default=8, metavar="N", help="bits of a weight: 8")
    add("--a_bit", type=int, default=8, metavar="N", help="bits of an activation: 8 (default) or 16")
    add("--is_dynamic", type=boolean, default=False, metavar="BOOL", help="W8A8_DYNAMIC: activations per token")
    add("--disable_names", nargs="*", default=[], metavar="NAME", help="Linears to keep in full precision")
    add("--disable_level", default="L0", metavar="Ln", help="so many more, those with the longest tails of inputs")
    add("--act_method", type=int, default=1, metavar="N", help="1 minmax, 2 histogram, 3 one of them for each layer")
    add("--anti_method", default="", metavar="M", help="m1 SmoothQuant, m3 AWQ (with a_bit 16), '' nothing")
    add("--use_kvcache_quant", type=boolean, default=False, metavar="BOOL", help="a KV cache in int8 (C8)")
    add("--trust_remote_code", type=boolean, default=False, metavar="BOOL", help="run the folder's modelling code")
    add("--overwrite", action="store_true", help="replace a finished output")
    for name, only in ONLY.items():
        kind = boolean if isinstance(only, bool) else str
        add(f"--{name}", type=kind, default=only, metavar="VALUE", help=f"only {only}")
    for name in IDLE:
        add(f"--{name}", metavar="VALUE", help="without effect")
    add("--tokenizer_args", default="{}", metavar="JSON", help="only {}")


@dataclass(frozen=True)
class Job:
    """What the options mean: a run, and what is to be said first."""

    config: RunConfig
    notes: tuple[str, ...]


def job_of(args: argparse.Namespace, texts: Path) -> Job:
    """ConfigError for what quantkit does not do. `texts`: where `--calib_texts` are put, as a data file."""
    for name, only in ONLY.items():
        if getattr(args, name) != only:
            raise ConfigError(f"--{name} {getattr(args, name)}: quantkit does only {only}")
    _check_tokenizer(args.tokenizer_args)
    scheme = SCHEMES.get((args.w_bit, args.a_bit, args.is_dynamic))
    if scheme is None:
        raise ConfigError(f"--w_bit {args.w_bit} --a_bit {args.a_bit}: there are 8 and 8, and 8 and 16")
    if args.act_method not in OBSERVERS:
        raise ConfigError(
            f"--act_method {args.act_method}: there are 1 (minmax), 2 (histogram), 3 (one for each layer)"
        )
    folder = resolve_model(args.model_path)
    names, known = tuple(args.disable_names), _linears(folder)
    for name in names:
        if name not in known:
            raise ConfigError(f"--disable_names {name}: the model has no Linear of that name; give full names")
    head = next((name for name in known if name.endswith("lm_head")), None)
    experts = any(".experts." in name for name in known)
    common: dict[str, Any] = {"ignore": tuple(n for n in names if n != head)}
    if args.use_kvcache_quant:
        common["kv_cache_scheme"] = QuantizationArgs(8, "int", strategy="channel")
    if scheme == "W8A8_STATIC_ASYM":
        common["input_observer"] = OBSERVERS[args.act_method]
    if scheme == "W8A8_STATIC_ASYM" and experts:
        common["scheme"] = {"W8A8": [EXPERTS], scheme: ["Linear"]}
    else:
        common["scheme"] = scheme
    recipe = Recipe((*_against_outliers(args), QuantizationModifier(**common)))
    data = _data(args, texts)
    if data is None and (recipe.needs_data or args.disable_level != "L0"):
        raise ConfigError("--calib_file: is missing, and this looks at activations; give boolq.jsonl or your own")
    save = Path(args.save_directory)
    config = RunConfig(
        GlobalConfig(str(save.parent), _shard_size(args.part_file_size), overwrite=args.overwrite),
        ModelConfig(str(folder), trust_remote_code=args.trust_remote_code),
        CompressionConfig(recipe=recipe, save_name="mindie", disable_level=args.disable_level),
        data,
        source=Path("msmodelslim"),
        stem=save.name,
    )
    notes = [f"--{name}: without effect" for name in IDLE if getattr(args, name) is not None]
    if scheme == "W8A8_STATIC_ASYM" and experts:
        notes.append("experts are quantized at run time (W8A8_DYNAMIC): NPUs serve no static ones")
    if scheme == "W8A8_STATIC_ASYM" and not names and args.disable_level == "L0":
        notes.append(
            "every Linear but the head is quantized; the scripts for Llama 3 keep all down_proj in full precision "
            "(name them in --disable_names), which costs size and gains accuracy"
        )
    return Job(config, tuple(notes))


def _linears(folder: Path) -> set[str]:
    with Checkpoint(folder) as checkpoint:
        return {n.removesuffix(".weight") for n, info in checkpoint.tensors.items() if len(info.shape) == 2}


def _against_outliers(args: argparse.Namespace) -> list[Modifier]:
    if args.anti_method not in ANTI_METHODS:
        raise ConfigError(
            f"--anti_method {args.anti_method}: there are m1 (SmoothQuant) and m3 (AWQ, with --a_bit 16); the others "
            "have no published definition, and m1 is what does most of their work"
        )
    if args.anti_method == "m3" and args.a_bit != 16:
        raise ConfigError("--anti_method m3: AWQ is for weights alone; give --a_bit 16, or m1")
    if args.anti_method == "m1":
        return [SmoothQuantModifier(smoothing_strength=0.5)]
    return [AWQModifier()] if args.anti_method == "m3" else []


def _check_tokenizer(text: str) -> None:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--tokenizer_args: not JSON ({error})") from None
    if found:
        raise ConfigError(f"--tokenizer_args {text}: quantkit takes the model's own tokenizer as it is; leave it out")


def _data(args: argparse.Namespace, texts: Path) -> DatasetConfig | None:
    if args.calib_texts and args.calib_file:
        raise ConfigError("--calib_texts and --calib_file both given; use one of them")
    if args.calib_texts:
        texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in args.calib_texts))
        return DatasetConfig(str(texts), num_samples=-1)
    if args.calib_file and not Path(args.calib_file).exists():
        raise ConfigError(f"--calib_file: {args.calib_file} is not there")
    return DatasetConfig(args.calib_file, num_samples=-1) if args.calib_file else None


def _shard_size(gib: float | None) -> str:
    if gib is None:
        return "1000TB"
    if gib <= 0:
        raise ConfigError(f"--part_file_size {gib}: must be positive")
    return f"{int(gib * 2**30)}"


def run(args: argparse.Namespace) -> int:
    """Quantize as the options say; the exit status of `quantkit run`."""
    from . import engine
    from .report.plan_view import render_plan

    with tempfile.TemporaryDirectory() as folder:
        job = job_of(args, Path(folder) / "texts.jsonl")
        for note in job.notes:
            print(f"note: {note}")
        result = engine.run(job.config, show=lambda plan: print(render_plan(plan), flush=True))
    print(f"\n{result.audit.render()}\nwritten to {result.output}")
    return 0 if result.audit.ok else 1
