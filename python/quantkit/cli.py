"""The command line: parse, call the engine, print. Exit status: 0 fine, 1 an audit or check failed, 2 a user error."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from . import __version__, distributed
from .checkpoint.native import host
from .errors import Interrupted, QuantkitError
from .startup import leave

if TYPE_CHECKING:
    from .config.run_config import RunConfig


# Between the check of a mapped file and the access.
BUS_ERROR = (
    "\nquantkit: error: a mapped file (of the model, or of hidden states) was truncated, or its disk failed, while it "
    "was being read. What is done is kept: once the files are whole again, the same command goes on from there\n"
)


def _config(args: argparse.Namespace) -> RunConfig:
    from .config.yaml_file import load_run_config

    return load_run_config(
        args.config,
        overrides=args.set,
        model_path=args.model_path,
        save_path=args.save_path,
        overwrite=getattr(args, "overwrite", False),
        statistics=args.statistics,
    )


def _calibrate(args: argparse.Namespace) -> int:
    from .calibrate import calibrate
    from .config.yaml_file import load_run_config

    config = load_run_config(
        args.config, overrides=args.set, model_path=args.model_path, save_path=args.save_path, calibrate=True
    )
    _end_cleanly_on_signals()
    output = None if args.output is None else Path(args.output)
    folder = calibrate(config, output, overwrite=args.overwrite, restart=args.restart)
    if distributed.ranks().first:
        print(f"written to {folder}")
    return 0


def _merge_statistics(args: argparse.Namespace) -> int:
    from .merge_statistics import merge_statistics

    print(f"written to {merge_statistics(args.folders, args.output, overwrite=args.overwrite)}")
    return 0


def _end_cleanly_on_signals() -> None:
    """SIGINT and SIGTERM end the run as an error would: what is done is kept for a later one."""

    def stop(number: int, _: object) -> None:
        raise Interrupted(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    host().explain_bus_errors(BUS_ERROR, 2)


def _run(args: argparse.Namespace) -> int:
    from . import engine
    from .report.plan_view import render_plan

    config = _config(args)
    _end_cleanly_on_signals()
    show = lambda plan: print(render_plan(plan), flush=True)  # noqa: E731
    result = engine.run(config, show=show, restart=args.restart)
    if not distributed.ranks().first:
        return 0 if result.audit.ok else 1
    if result.report is not None and (told := result.report.render()):
        print(f"\n{told}")
    print(f"\n{result.audit.render()}")
    times = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in result.seconds.items())
    print(f"written to {result.output} ({times})")
    return 0 if result.audit.ok else 1


def _plan(args: argparse.Namespace) -> int:
    from .engine import open_plan
    from .errors import ConfigError
    from .report.plan_view import render_plan

    if args.ranks < 1:
        raise ConfigError(f"--ranks {args.ranks}: at least one process works on a model")
    with open_plan(_config(args), planned_ranks=args.ranks) as plan:
        print(render_plan(plan), flush=True)
        plan.require_room()
    return 0


def _audit(args: argparse.Namespace) -> int:
    from .audit import audit
    from .checkpoint.hub import resolve_model
    from .formats.fp8_source import open_source

    with open_source(resolve_model(args.source)) as source:
        result = audit(Path(args.output), source)
    print(result.render())
    if args.json:
        Path(args.json).write_text(result.to_json() + "\n")
    return 0 if result.ok else 1


def _eval(args: argparse.Namespace) -> int:
    from .checkpoint.hub import resolve_model
    from .errors import ConfigError

    if not args.text and not args.tasks:
        raise ConfigError("nothing to measure: give --text FILE for perplexity, --tasks NAMES for tasks, or both")
    model, baseline = resolve_model(args.model), resolve_model(args.baseline) if args.baseline else None
    told: dict[str, object] = {}
    if args.text:
        from .evaluate import evaluate

        result = evaluate(
            model,
            Path(args.text),
            reference=baseline,
            windows=args.windows,
            window_length=args.window_length,
            backend=args.backend,
            dtype=args.dtype,
            trust_remote_code=args.trust_remote_code,
            vllm_python=args.vllm_python,
        )
        print(result.render())
        told["perplexity"] = asdict(result)
    if args.tasks:
        from .tasks import evaluate_tasks

        found = evaluate_tasks(
            model,
            [name.strip() for name in args.tasks.split(",") if name.strip()],
            baseline,
            backend=args.backend,
            task_path=args.task_path,
            num_fewshot=args.num_fewshot,
            limit=args.limit,
            dtype=args.dtype,
            max_length=args.max_length,
            add_bos_token=args.add_bos_token,
            apply_chat_template=args.apply_chat_template,
            trust_remote_code=args.trust_remote_code,
            vllm_python=args.vllm_python,
        )
        print(found.render())
        told["tasks"] = json.loads(found.to_json())
    if args.json:
        Path(args.json).write_text(json.dumps(told, indent=2) + "\n")
    return 0


def _generate(args: argparse.Namespace) -> int:
    from .calibration.dataset import load_tokenizer
    from .checkpoint.hub import resolve_model
    from .runtime.generate import generate
    from .runtime.load import load

    folder = resolve_model(args.model)
    model = load(
        folder,
        dtype=args.dtype,
        attn_implementation=args.attn_implementation,
        trust_remote_code=args.trust_remote_code,
    )
    result = generate(
        model,
        load_tokenizer(folder, trust_remote_code=args.trust_remote_code),
        args.prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        seed=args.seed,
        chat=args.chat,
        show=lambda text: print(text, end="", flush=True),
    )
    print(flush=True)
    print(result.render(), file=sys.stderr)
    return 0


def _check(args: argparse.Namespace) -> int:
    from .conformance import check_folder

    verdict = check_folder(args.folder, args.client, hardware=args.on, tensor_parallel=args.tensor_parallel)
    print(verdict.render())
    if args.json:
        Path(args.json).write_text(verdict.to_json() + "\n")
    return 0 if verdict.ok else 1


def _inspect(args: argparse.Namespace) -> int:
    from .inspection import inspect_folder

    found = inspect_folder(args.folder)
    print(found.render())
    if args.json:
        Path(args.json).write_text(found.to_json() + "\n")
    return 0


def _convert(args: argparse.Namespace) -> int:
    from .convert import convert

    made = convert(args.source, args.target, args.format, scheme=args.scheme, overwrite=args.overwrite)
    print(f"written to {made}")
    return 0


def _msmodelslim(args: argparse.Namespace) -> int:
    from .msmodelslim import run

    return run(args)


def _env(args: argparse.Namespace) -> int:
    from .env import report

    print(report())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="quantkit", description="Quantize large language models for vLLM, SGLang, Transformers and MindIE."
    )
    parser.add_argument("--version", action="version", version=f"quantkit {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, function: Callable[[argparse.Namespace], int], help_: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help_, description=help_[0].upper() + help_[1:] + ".")
        sub.set_defaults(function=function)
        return sub

    for name, function, help_ in (
        ("run", _run, "quantize a model as a YAML file says, then audit the result"),
        ("plan", _plan, "show what a run would do, from config.json and safetensors headers alone"),
    ):
        sub = add(name, function, help_)
        sub.add_argument("-c", "--config", required=True, metavar="FILE", help="the YAML file")
        sub.add_argument("--model-path", metavar="PATH", help="replaces model.model_path: a folder or a hub id")
        sub.add_argument("--save-path", metavar="DIR", help="replaces global.save_path")
        sub.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", help="replaces any key: dataset.num_samples=64"
        )
        sub.add_argument(
            "--statistics",
            metavar="DIR",
            help="do not run the model: take what quantkit calibrate saved (replaces calibration.statistics)",
        )
        if name == "plan":
            sub.add_argument(
                "--ranks",
                type=int,
                default=1,
                metavar="N",
                help="as N processes of torchrun on this machine (default 1)",
            )
        if name == "run":
            sub.add_argument("--overwrite", action="store_true", help="replace a finished output of the same name")
            sub.add_argument(
                "--restart", action="store_true", help="start over, and remove what an unfinished run has done"
            )

    sub = add("calibrate", _calibrate, "run the model once and save what its inputs are like, for many runs")
    sub.add_argument("-c", "--config", required=True, metavar="FILE", help="the YAML file: its model and its data")
    sub.add_argument("-o", "--output", metavar="DIR", help="where to (default: <output of a run>-statistics)")
    sub.add_argument("--model-path", metavar="PATH", help="replaces model.model_path: a folder or a hub id")
    sub.add_argument("--save-path", metavar="DIR", help="replaces global.save_path")
    sub.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="replaces any key: dataset.num_samples=64"
    )
    sub.add_argument("--overwrite", action="store_true", help="replace finished statistics of the same name")
    sub.add_argument(
        "--restart", action="store_true", help="start over, and remove what an unfinished calibration has done"
    )

    sub = add("merge-statistics", _merge_statistics, "add up statistics of one model from several machines' data")
    sub.add_argument("folders", nargs="+", metavar="DIR", help="what quantkit calibrate wrote, each of other data")
    sub.add_argument("-o", "--output", required=True, metavar="DIR", help="where to")
    sub.add_argument("--overwrite", action="store_true", help="replace finished statistics of the same name")

    sub = add("audit", _audit, "compare a quantized folder with its source, tensor by tensor")
    sub.add_argument("output", help="the quantized folder")
    sub.add_argument("--source", required=True, help="the full-precision model: a folder or a hub id")
    sub.add_argument("--json", metavar="FILE", help="also write every figure to FILE")

    sub = add(
        "eval", _eval, "measure perplexity and tasks, and what quantization costs against the full-precision model"
    )
    sub.add_argument("model", help="a folder or hub id, quantized or not")
    sub.add_argument(
        "--text", metavar="FILE", help="plain text: perplexity, and KL and top-1 agreement with a baseline"
    )
    sub.add_argument("--tasks", metavar="NAMES", help="tasks of lm-eval, separated by commas (needs the extra 'eval')")
    sub.add_argument("--baseline", "--reference", metavar="MODEL", help="the model to compare with, usually the source")
    sub.add_argument(
        "--backend",
        choices=("dequantized", "quantkit", "hf", "vllm"),
        default="dequantized",
        help="who runs the model: quantkit with dequantized weights, a layer at a time (default), quantkit.load, "
        "Transformers' own loader, or vLLM",
    )
    sub.add_argument("--windows", type=int, default=100, help="--text: how many windows of it (default 100)")
    sub.add_argument(
        "--window-length", type=int, default=256, metavar="N", help="--text: tokens in a window (default 256)"
    )
    sub.add_argument("--task-path", metavar="DIR", help="--tasks: a folder with task files of your own")
    sub.add_argument("--num-fewshot", type=int, metavar="N", help="--tasks: examples in front (default: the task's)")
    sub.add_argument("--limit", type=int, metavar="N", help="--tasks: only the first N samples of each")
    sub.add_argument(
        "--max-length", type=int, metavar="N", help="--tasks: tokens of a text at most (default: the model's, to 4096)"
    )
    sub.add_argument(
        "--add-bos-token",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="--tasks: put the tokenizer's special tokens in front, or not (default: as the tokenizer does)",
    )
    sub.add_argument("--apply-chat-template", action="store_true", help="--tasks: prompts as chats")
    sub.add_argument("--dtype", help="of all that is not quantized (default float32; in vLLM the model's)")
    sub.add_argument("--vllm-python", metavar="FILE", help="an interpreter with vLLM (or QUANTKIT_VLLM_PYTHON)")
    sub.add_argument("--json", metavar="FILE", help="also write every figure to FILE")
    sub.add_argument("--trust-remote-code", action="store_true", help="run modelling code that the folder brings along")

    sub = add("generate", _generate, "continue a text with a quantized model, on quantkit's own kernels")
    sub.add_argument("model", help="the quantized folder, or a hub id")
    sub.add_argument("-p", "--prompt", required=True, metavar="TEXT", help="what to continue")
    sub.add_argument("--chat", action="store_true", help="TEXT is a user's message: apply the chat template")
    sub.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="at most so many (default 128)")
    sub.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="sample at T; 0 (default): the most probable token"
    )
    sub.add_argument("--seed", type=int, metavar="N", help="makes sampling repeatable")
    sub.add_argument("--dtype", help="of all that is not quantized: float32, float16, bfloat16 (default: the model's)")
    sub.add_argument("--attn-implementation", metavar="NAME", help="as Transformers calls it (default sdpa)")
    sub.add_argument("--trust-remote-code", action="store_true", help="run modelling code that the folder brings along")

    sub = add("check", _check, "say whether a server takes a quantized folder, by its loader's own rules")
    sub.add_argument("folder", help="the quantized folder")
    sub.add_argument(
        "--for", dest="client", required=True, metavar="CLIENT", help="vllm, sglang, transformers, gptqmodel, mindie"
    )
    sub.add_argument("--on", default="cuda", metavar="HARDWARE", help="cuda (default) or cpu")
    sub.add_argument(
        "--tensor-parallel", type=int, default=1, metavar="N", help="ranks that share each layer (default 1)"
    )
    sub.add_argument("--json", metavar="FILE", help="also write every finding to FILE")

    sub = add("inspect", _inspect, "show what a quantized folder holds: schemes, bits, scales, outliers")
    sub.add_argument("folder", help="the folder, in any format that quantkit reads")
    sub.add_argument("--json", metavar="FILE", help="also write every figure to FILE")

    sub = add("convert", _convert, "write a quantized folder in another format that holds the same codes, without loss")
    sub.add_argument("source", help="the quantized folder")
    sub.add_argument("target", help="the folder to be written")
    sub.add_argument("--format", required=True, metavar="NAME", help="compressed-tensors, gptq, awq, fp8, bitsandbytes")
    sub.add_argument("--overwrite", action="store_true", help="replace a finished output of the same name")

    sub.add_argument("--scheme", metavar="NAME", help="a scheme with the same weights, whose activations it gets")
    sub = add("msmodelslim", _msmodelslim, "quantize for Ascend NPUs, with the options of its convert_quant_weights.py")
    from .msmodelslim import add_arguments

    add_arguments(sub)

    add("env", _env, "print versions, the instruction set in use, and which libraries are loaded or why not")
    return parser


def entry(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the `quantkit` command."""
    leave(main(argv))


def main(argv: Sequence[str] | None = None) -> int:
    """The `quantkit` command; gives back its exit status."""
    args = _parser().parse_args(argv)
    try:
        status: int = args.function(args)
    except QuantkitError as error:
        if distributed.told(error):
            return 2
        print(f"quantkit {args.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        kept = getattr(error, "kept", "") or "nothing finished was changed"
        print(f"quantkit {args.command}: {error or 'interrupted'}; {kept}", file=sys.stderr)
        return 128 + getattr(error, "number", signal.SIGINT)
    return status
