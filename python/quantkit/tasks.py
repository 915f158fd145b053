"""What quantization costs in tasks: lm-eval's, or those of local task files, before and after."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .errors import CheckpointError, ConfigError, nearest
from .scoring import check_backend, open_scorer

if TYPE_CHECKING:
    import torch

# What lm-eval is made for measuring with: metrics where less is more, should a task not say.
LOWER = ("perplexity", "bits_per_byte", "brier_score", "ter")


@dataclass(frozen=True)
class Figure:
    """One metric of one task. `before` and `recovery` (percent: what is left of it) are None without a baseline; errors
    are standard errors, None where lm-eval has none.
    """

    task: str
    metric: str
    higher_is_better: bool
    after: float
    after_error: float | None = None
    before: float | None = None
    before_error: float | None = None
    samples: int | None = None

    @property
    def recovery(self) -> float | None:
        """after / before in percent, before / after where less is better; None if that divides by nothing."""
        if self.before is None:
            return None
        part, whole = (self.after, self.before) if self.higher_is_better else (self.before, self.after)
        return None if whole == 0 else 100 * part / whole


@dataclass(frozen=True)
class TaskResults:
    """What `evaluate_tasks` found. `backend` and `baseline_backend` say who computed, and how."""

    model: str
    backend: str
    figures: list[Figure]
    baseline: str | None = None
    baseline_backend: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def recovery(self) -> float | None:
        """The mean over tasks of the recovery of each one's first metric; None without a baseline."""
        first = {figure.task: figure for figure in reversed(self.figures)}
        known = [r for figure in first.values() if (r := figure.recovery) is not None]
        return sum(known) / len(known) if known else None

    def render(self) -> str:
        """A table for the terminal."""
        lines = [f"{self.model} ({self.backend})"]
        if self.baseline is not None:
            lines.append(f"  against {self.baseline} ({self.baseline_backend})")
        head = ["task", "metric", *(["before", "after", "recovery"] if self.baseline is not None else ["value"])]
        rows = [head]
        for f in self.figures:
            row = [f.task, f.metric + ("" if f.higher_is_better else " (less is better)")]
            if self.baseline is not None:
                row.append(_shown(f.before, f.before_error))
            row.append(_shown(f.after, f.after_error))
            if self.baseline is not None:
                row.append("-" if f.recovery is None else f"{f.recovery:.2f} %")
            rows.append(row)
        if self.recovery is not None:
            rows.append(["mean of tasks", "", "", "", f"{self.recovery:.2f} %"])
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        for row in rows:
            cells = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
            lines.append("  " + "  ".join(cells).rstrip())
        return "\n".join(lines)

    def to_json(self) -> str:
        """All of it, each figure with its recovery."""
        figures = [asdict(figure) | {"recovery": figure.recovery} for figure in self.figures]
        return json.dumps(asdict(self) | {"figures": figures, "recovery": self.recovery}, indent=2)


def _shown(value: float | None, error: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")


def evaluate_tasks(
    model: str | Path,
    tasks: Sequence[str],
    baseline: str | Path | None = None,
    *,
    backend: str = "quantkit",
    task_path: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    dtype: torch.dtype | str | None = None,
    max_length: int | None = None,
    add_bos_token: bool | None = None,
    apply_chat_template: bool = False,
    trust_remote_code: bool = False,
    vllm_python: str | Path | None = None,
    progress: bool = True,
) -> TaskResults:
    """Run lm-eval's `tasks` (names, groups, patterns) on the checkpoint in folder `model`, and on the one in `baseline`
    if given, usually the source.

    `backend`: one of `quantkit.scoring.BACKENDS`. The baseline has the same one; but where `model` runs on quantkit's
    kernels and the baseline is not quantized, it is computed as "dequantized" is. `task_path`: a folder with task
    files of one's own; tasks from it need no network. `num_fewshot` examples in front, the task's own number unless
    given; the
    first `limit` samples of each task, all unless given. `add_bos_token`: as lm-eval's argument of that name.

    ConfigError if lm-eval is not installed or does not know a task.
    """
    check_backend(backend)
    manager, names = _find(tasks, task_path)
    options = {
        "num_fewshot": num_fewshot,
        "limit": limit,
        "add_bos_token": add_bos_token,
        "apply_chat_template": apply_chat_template,
    }
    how: dict[str, Any] = {
        "dtype": dtype,
        "max_length": max_length,
        "trust_remote_code": trust_remote_code,
        "vllm_python": vllm_python,
        "progress": progress,
    }
    after, backend_after = _measure(Path(model), backend, names, manager, options, how)
    before: dict[tuple[str, str], Figure] = {}
    backend_before = None
    if baseline is not None:
        theirs = backend
        if backend == "quantkit" and not _is_quantized(Path(baseline)):
            theirs = "dequantized"
        found, backend_before = _measure(Path(baseline), theirs, names, manager, options, how)
        before = {(f.task, f.metric): f for f in found}
    figures = []
    for figure in after:
        old = before.get((figure.task, figure.metric))
        added = {} if old is None else {"before": old.after, "before_error": old.after_error}
        figures.append(Figure(**(asdict(figure) | added)))
    return TaskResults(
        model=str(model),
        backend=backend_after,
        figures=figures,
        baseline=None if baseline is None else str(baseline),
        baseline_backend=backend_before,
        settings={"tasks": names, **options, "max_length": max_length},
        versions={"quantkit": __version__, "lm_eval": importlib.metadata.version("lm_eval")},
    )


def _measure(
    folder: Path, backend: str, names: list[str], manager: Any, options: Mapping[str, Any], how: dict[str, Any]
) -> tuple[list[Figure], str]:
    from lm_eval import simple_evaluate

    from .calibration.dataset import load_tokenizer
    from .integrations.lm_eval_model import ScoredLM

    tokenizer = load_tokenizer(folder, trust_remote_code=how["trust_remote_code"])
    if options["apply_chat_template"] and not getattr(tokenizer, "chat_template", None):
        raise ConfigError(f"{folder}: --apply-chat-template, but the model's tokenizer has no chat template")
    scorer = open_scorer(folder, backend, **how)
    try:
        with _told():
            results = simple_evaluate(
                model=ScoredLM(scorer, tokenizer, options["add_bos_token"]),
                tasks=names,
                task_manager=manager,
                num_fewshot=options["num_fewshot"],
                limit=options["limit"],
                apply_chat_template=options["apply_chat_template"],
                bootstrap_iters=1000,
                log_samples=False,
            )
    finally:
        scorer.close()
    assert results is not None  # None on other ranks only, and there is one
    return _figures(results), scorer.describe


@contextmanager
def _told() -> Iterator[None]:
    """lm-eval's failures to get a task's data as errors that say what to do."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (DatasetsError, ConnectionError, FileNotFoundError) as error:
        raise ConfigError(
            f"lm-eval did not get the data of a task: {type(error).__name__}: {error}; tasks that ship with lm-eval "
            "fetch theirs from the Hugging Face hub, without a network use task files of your own with --task-path "
            "(see docs/evaluation.md)"
        ) from error


def _figures(results: Mapping[str, Any]) -> list[Figure]:
    """A line for each task and metric, in lm-eval's order."""
    found = []
    for task, metrics in results["results"].items():
        direction = results.get("higher_is_better", {}).get(task, {})
        counted = results.get("n-samples", {}).get(task, {}).get("effective")
        for key, value in metrics.items():
            metric, _, filtered = key.partition(",")
            if metric in ("alias", "name", "sample_len", "sample_count") or metric.endswith("_stderr"):
                continue
            if not isinstance(value, (int, float)):
                continue
            error = metrics.get(f"{metric}_stderr,{filtered}")
            higher = direction.get(metric)
            name = metric if filtered in ("", "none") else f"{metric}, {filtered}"
            found.append(
                Figure(
                    task,
                    name,
                    not any(word in metric for word in LOWER) if higher is None else bool(higher),
                    float(value),
                    float(error) if isinstance(error, (int, float)) else None,
                    samples=counted,
                )
            )
    return found


def _find(tasks: Sequence[str], task_path: str | Path | None) -> tuple[Any, list[str]]:
    """lm-eval's index of tasks, and the names in it that `tasks` means."""
    if task_path is not None and not Path(task_path).is_dir():
        raise ConfigError(f"--task-path: {task_path} is not a folder")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            f"tasks need lm-eval, which cannot be imported ({error}); install it with: pip install 'lm_eval==0.4.13', "
            "or quantkit with its extra 'eval'"
        ) from error
    for name in ("lm_eval", "lm-eval"):  # it tells each setting; errors come as exceptions
        logging.getLogger(name).setLevel(logging.ERROR)
    if not tasks:
        raise ConfigError("--tasks: no task is named")
    if task_path is not None:  # lm-eval's own are thousands of files, so they are looked at only if needed
        manager = TaskManager(include_path=str(task_path), include_defaults=False)
        found = [manager.match_tasks([task]) for task in tasks]
        if all(found):
            return manager, _distinct(found)
    manager = TaskManager(include_path=None if task_path is None else str(task_path))
    found = [manager.match_tasks([task]) for task in tasks]
    for task, names in zip(tasks, found, strict=True):
        if not names:
            where = "lm-eval's own" if task_path is None else f"lm-eval's own and those of {task_path}"
            raise ConfigError(
                f"--tasks: no task, group or tag is named '{task}'{nearest(task, manager.all_tasks)}; known are {where}"
                ", and --task-path adds a folder of task files"
            )
    return manager, _distinct(found)


def _distinct(found: Sequence[Sequence[str]]) -> list[str]:
    return list(dict.fromkeys(name for names in found for name in names))


def _is_quantized(folder: Path) -> bool:
    try:
        return "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}/config.json: not found") from None
