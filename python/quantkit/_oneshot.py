"""`from quantkit import oneshot`: llm-compressor's call on quantkit's engine. See docs/oneshot.md.

The module's name differs from the function's, so that `quantkit.oneshot` is the function whatever was imported before.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from . import distributed
from .config.fields import FieldError, check
from .config.recipe import GPTQModifier, Modifier, QuantizationModifier, Recipe
from .config.recipe_file import recipe_of
from .config.run_config import (
    DTYPES,
    FORWARDS,
    CalibrationConfig,
    CompressionConfig,
    DatasetConfig,
    GlobalConfig,
    ModelConfig,
    RunConfig,
)
from .errors import ConfigError, PlanError, QuantkitError, nearest

if TYPE_CHECKING:
    from .calibration.user_data import LazyTokenizer, RowOptions
    from .checkpoint.reader import Checkpoint
    from .report.calibration import CalibrationReport

_IN_MEMORY = "given to oneshot"
_LAYERS = "decoder layers go through one sweep, one in memory at a time"
_FETCHING = "data sets are not fetched here; load them with the library datasets"
# llm-compressor's words for the kind of file that dataset_path names; here its ending tells.
_KINDS = ("custom", "json", "jsonl", "csv", "text", "parquet")
# llm-compressor's arguments that change nothing here, and what decides instead.
IDLE: dict[str, str] = {
    "config_name": "the config is the model's own",
    "tie_word_embeddings": "embeddings stay tied, or not, as they are",
    "clear_sparse_session": "there is no session",
    "batch_size": "rows of like length share a forward, some thousand tokens at a time",
    "data_collator": "rows are cut, never padded",
    "pad_to_max_length": "padding never enters statistics",
    "use_loss_mask": "every token counts that is not padding",
    "raw_kwargs": _FETCHING,
    "remove_columns": "columns that are not read do no harm",
    "dataset_config_name": _FETCHING,
    "streaming": _FETCHING,
    "overwrite_cache": _FETCHING,
    "preprocessing_num_workers": _FETCHING,
    "dataloader_num_workers": _FETCHING,
    "pipeline": _LAYERS,
    "tracing_ignore": "nothing is traced",
    "sequential_targets": _LAYERS,
    "sequential_targets_per_subgraph": _LAYERS,
    "sequential_offload_device": _LAYERS,
    "sequential_prefetch": _LAYERS,
    "quantization_aware_calibration": "activations are quantized once their scales are known",
    "propagate_error": "each layer is calibrated on what the quantized layers before it give",
    "log_dir": "what happened stands in quantkit_report.json",
    "enable_compile": "the work is done by compiled kernels",
}


def oneshot(
    model: Any,
    *,
    recipe: Any = None,
    dataset: Any = None,
    tokenizer: Any = None,
    processor: Any = None,
    output_dir: str | os.PathLike[str] | None = None,
    statistics: str | os.PathLike[str] | None = None,
    recipe_args: Mapping[str, Any] | None = None,
    stage: str | None = None,
    num_calibration_samples: int | None = 512,
    max_seq_length: int | None = 2048,
    shuffle_calibration_samples: bool = True,
    seed: int = 0,
    text_column: str = "text",
    concatenate_data: bool = False,
    dataset_path: str | os.PathLike[str] | None = None,
    splits: Any = None,
    preprocessing_func: Callable[[Any], Any] | None = None,
    min_tokens_per_module: float | None = None,
    moe_calibrate_all_experts: bool | None = None,
    save_compressed: bool = True,
    save_name: str = "compressed-tensors",
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    precision: str = "auto",
    calibration_forwards: int | str = "auto",
    trust_remote_code_model: bool = False,
    model_revision: str | None = None,
    progress: bool = True,
    **others: Any,
) -> Any:
    """Quantize `model` as `recipe` says, calibrating with `dataset` where the recipe looks at activations.

    A model of Transformers is quantized in place and given back: `generate` runs quantized, `save_pretrained` writes it
    compressed. Until everything is computed it is as it was. A path (folder or hub id) with `output_dir` is streamed
    from disk to disk, never held in memory, and the output's Path is given back; without `output_dir` it is loaded on
    the CPU and quantized like an object.

    Args:
        recipe: modifiers (instances, classes, names), a list of them, YAML text, or a path; see `recipe_args`, `stage`.
        dataset: a `datasets.Dataset` or DatasetDict (`splits` picks one: "train[:64]"), a list of texts, of samples
            {"text"}, {"messages"} or {"input_ids"}, of id lists, a tensor of ids [rows, tokens], a DataLoader, a path.
        tokenizer: for text only; an object or a path; that of the model's folder if not given. `processor` likewise.
        output_dir: where to write the result; with a model object it is saved there too.
        statistics: a folder of `quantkit calibrate` in the place of data; the model is not run (docs/scale.md).
        recipe_args: values for `{{ name }}` in YAML, or for arguments of modifiers by name.
        num_calibration_samples: rows at most; None: all. `max_seq_length`: tokens of a row at most.
        min_tokens_per_module: of GPTQ's experts; below 1 a share of all tokens. See GPTQModifier.
        save_compressed: False writes plain weights with the values of the codes. `save_name`: the format otherwise,
            e.g. "gptq" or "mindie".
        precision: dtype of the calibration forward; auto: the model's own.
        calibration_forwards: of each layer: 1, 2, or auto: 1 where that does. See docs/algorithms.md.

    Arguments of llm-compressor that change nothing here are accepted and said on stderr. Raises QuantkitError, before
    anything long is done, for whatever can be known by then to be wrong.
    """
    from .calibration.user_data import gather_rows

    idle = _check_others(others)
    options = _Options(
        num_calibration_samples,
        max_seq_length,
        seed,
        text_column,
        precision,
        calibration_forwards,
        save_compressed,
        save_name,
        max_shard_size,
        overwrite,
        shuffle_calibration_samples,
        concatenate_data,
        trust_remote_code_model,
        moe_calibrate_all_experts,
        min_tokens_per_module,
        progress,
    )
    if recipe is None:
        raise ConfigError(
            'recipe: is missing; say what to do, e.g. recipe=GPTQModifier(scheme="W4A16", ignore=["lm_head"])'
        )
    read = recipe_of(recipe, stage=stage, args=_mapping("recipe_args", recipe_args))
    idle += read.idle
    output = _folder("output_dir", output_dir)
    data = _data(dataset, dataset_path)
    seen = _folder("statistics", statistics)
    runs_model = read.needs_data and seen is None
    if runs_model and data is None:
        raise ConfigError(f"dataset: is missing, and {read.name} looks at activations; give calibration data")
    target = _opened_model(model, model_revision)
    if not isinstance(target, Path) and model_revision not in (None, "main"):
        idle.append("model_revision")
    if min_tokens_per_module is not None and not any(isinstance(m, GPTQModifier) for m in read.modifiers):
        idle.append("min_tokens_per_module")
    if tokenizer is None and processor is not None:
        tokenizer = getattr(processor, "tokenizer", processor)
    if not read.needs_data and data is not None:
        _say(f"{read.name} needs no data: dataset is ignored")
    elif read.needs_data and seen is not None and data is not None:
        _say("statistics stand in for data: dataset is ignored")
    if not read.needs_data and seen is not None:
        idle.append("statistics")
    if idle:
        _say(f"accepted, without effect: {', '.join(idle)}")
    where, vocab_size = _identity(target)
    if output is not None:
        _require_free(output, where, overwrite)
    rows: list[list[int]] | None = None
    if runs_model:
        lazy = _lazy(tokenizer, where, trust_remote_code_model)
        rows = gather_rows(data, lazy, options.rows(splits, preprocessing_func), vocab_size)
        _say(f"calibrating with {len(rows)} rows, {sum(map(len, rows))} tokens")
    read = options.adjusted(read, rows)
    if isinstance(target, Path) and output is not None and save_compressed:
        return _stream(options.run_config(where, output, read, rows, seen), rows, progress)
    if isinstance(target, Path):
        target = _loaded(target, precision, trust_remote_code_model)
    config = options.run_config(_public(where), output, read, rows, seen)
    _quantize(target, config, rows, progress)
    if output is not None and distributed.ranks().first:
        target.save_pretrained(output, save_compressed=save_compressed)
        _save_tokenizer(tokenizer, where, output, trust_remote_code_model)
        _say(f"written to {output}")
    distributed.ranks().barrier()
    return target


@dataclass(frozen=True)
class _Options:
    """The plain arguments, of the right types."""

    num_calibration_samples: int | None
    max_seq_length: int | None
    seed: int
    text_column: str
    precision: str
    calibration_forwards: int | str
    save_compressed: bool
    save_name: str
    max_shard_size: int | str
    overwrite: bool
    shuffle_calibration_samples: bool
    concatenate_data: bool
    trust_remote_code_model: bool
    moe_calibrate_all_experts: bool | None
    min_tokens_per_module: float | None
    progress: bool

    def __post_init__(self) -> None:
        from typing import get_type_hints

        for name, hint in get_type_hints(type(self)).items():
            check(getattr(self, name), hint, name)
        count = self.num_calibration_samples
        if count is not None and count < 1 and count != -1:
            raise FieldError("num_calibration_samples", f"{count} must be positive, or None for all")
        if self.precision not in DTYPES:
            hint = nearest(self.precision, DTYPES)
            raise FieldError("precision", f"no such dtype: '{self.precision}'{hint}; use {', '.join(DTYPES)}")
        if self.calibration_forwards not in FORWARDS:
            raise FieldError("calibration_forwards", f"{self.calibration_forwards!r}: use auto, 1 or 2")
        if self.length < 2:
            raise FieldError("max_seq_length", f"{self.length} must be at least 2")

        if (self.min_tokens_per_module or 0) < 0:
            raise FieldError("min_tokens_per_module", f"{self.min_tokens_per_module} is negative")

    @property
    def length(self) -> int:
        return 2048 if self.max_seq_length is None else self.max_seq_length

    def rows(self, splits: Any, preprocess: Callable[[Any], Any] | None) -> RowOptions:
        """What of it concerns calibration rows."""
        from .calibration.user_data import RowOptions

        if preprocess is not None and not callable(preprocess):
            raise FieldError("preprocessing_func", f"expected a function of a sample, got {preprocess!r}")
        count = self.num_calibration_samples
        return RowOptions(
            num_samples=None if count == -1 else count,
            max_seq_length=self.length,
            shuffle=self.shuffle_calibration_samples,
            seed=self.seed,
            text_column=self.text_column,
            splits=splits,
            concatenate=self.concatenate_data,
            preprocess=preprocess,
        )

    def adjusted(self, recipe: Recipe, rows: Sequence[Sequence[int]] | None) -> Recipe:
        """`recipe` with what the call itself says about experts."""
        tokens = self.min_tokens_per_module
        if tokens is not None and 0 < tokens < 1:
            tokens *= sum(map(len, rows or ()))

        def adjusted(modifier: Modifier) -> Modifier:
            changes: dict[str, Any] = {}
            if tokens is not None and isinstance(modifier, GPTQModifier):
                changes["min_tokens_per_module"] = int(tokens)
            if self.moe_calibrate_all_experts is not None and isinstance(modifier, QuantizationModifier):
                changes["moe_calibrate_all_experts"] = self.moe_calibrate_all_experts
            return replace(modifier, **changes) if changes else modifier

        return Recipe(tuple(adjusted(modifier) for modifier in recipe.modifiers))

    def run_config(
        self,
        model: str,
        output: Path | None,
        recipe: Recipe,
        rows: Sequence[Sequence[int]] | None,
        statistics: Path | None,
    ) -> RunConfig:
        """The same as a YAML file would say it. Names of folders stand in for what has none."""
        folder = output or Path(f"{Path(model).name}-quantized").absolute()
        dataset = None
        if rows is not None:
            dataset = DatasetConfig(_IN_MEMORY, max_seq_length=max(map(len, rows)), num_samples=len(rows))
        return RunConfig(
            GlobalConfig(
                str(folder.parent),
                self.max_shard_size,
                self.seed,
                self.overwrite,
                calibration_forwards=self.calibration_forwards,
            ),
            ModelConfig(model, self.trust_remote_code_model, self.precision),
            CompressionConfig(recipe=recipe, save_name=self.save_name),
            dataset,
            source=Path(_IN_MEMORY),
            stem=folder.name,
            calibration=CalibrationConfig(statistics=None if statistics is None else str(statistics)),
        )


def _say(text: str) -> None:
    if not distributed.ranks().first:
        return
    print(f"quantkit: {text}", file=sys.stderr, flush=True)


def _check_others(others: Mapping[str, Any]) -> list[str]:
    """The names of `others`, all of which are known to have no effect."""
    own = [name for name in inspect.signature(oneshot).parameters if name != "others"]
    for name in others:
        if name not in IDLE:
            raise ConfigError(f"oneshot: no argument '{name}'{nearest(name, [*own, *IDLE])}; it has {', '.join(own)}")
    return list(others)


def _mapping(name: str, value: Any) -> Mapping[str, Any] | None:
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"{name}: expected a mapping of names to values, got {value!r}")
    return value


def _folder(name: str, value: Any) -> Path | None:
    if value is None:
        return None
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise ConfigError(f"{name}: expected a folder, got {value!r}")
    return Path(os.path.abspath(Path(value).expanduser()))


def _require_free(output: Path, source: str, overwrite: bool) -> None:
    """Refuse an output folder that would cost someone their files, before anything is computed."""
    if Path(source).is_dir() and os.path.realpath(source) == os.path.realpath(output):
        raise ConfigError(f"output_dir: {output} is the folder of the model itself; choose another")
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output_dir: {output} is a file; give a folder")
    if output.exists() and any(output.iterdir()) and not overwrite:
        raise ConfigError(f"output_dir: {output} is not empty; choose another, or replace it with overwrite=True")


def _opened_model(model: Any, revision: str | None) -> Any:
    """The folder of a path or hub id; a model as it is, if it has not been here before."""
    from .checkpoint.hub import resolve_model

    if isinstance(model, str | Path):
        return Path(resolve_model(model, revision=revision))
    if hasattr(model, "_quantkit"):
        raise PlanError(
            "model: is already quantized, by an earlier oneshot or quantkit.load; load the full-precision model "
            "again, and put all modifiers into one recipe"
        )
    from .models.live import require_plain

    require_plain(model)
    return model


def _data(dataset: Any, dataset_path: Any) -> Any:
    if dataset_path is None:
        return dataset
    if dataset is not None and not (isinstance(dataset, str) and dataset in _KINDS):
        raise ConfigError("dataset_path: and dataset both given; use one")
    if not isinstance(dataset_path, str | os.PathLike):
        raise ConfigError(f"dataset_path: expected a path, got {dataset_path!r}")
    return Path(dataset_path)


def _loaded(folder: Path, precision: str, remote: bool) -> Any:
    """The model in `folder`, on the CPU, in its own dtype unless `precision` says otherwise."""
    from transformers import AutoModelForCausalLM

    from .models.live import require_plain

    models: Any = AutoModelForCausalLM
    try:
        model = models.from_pretrained(folder, dtype=precision, trust_remote_code=remote, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise PlanError(f"{folder}: Transformers cannot load it: {str(error).strip()}") from error
    require_plain(model)
    return model


def _identity(target: Any) -> tuple[str, int | None]:
    """Where the model is from, as far as it says, and how large its vocabulary is."""
    if isinstance(target, Path):
        from .checkpoint.folder import CONFIG, checked_file
        from .checkpoint.header import read_object
        from .models.families import text_config

        size = text_config(read_object(checked_file(target, CONFIG))).get("vocab_size")
        return str(target), size if isinstance(size, int) else None
    name = str(getattr(target.config, "_name_or_path", "") or "")
    return name or type(target).__name__, int(target.config.vocab_size)


def _public(where: str) -> str:
    """A hub id as it is; of a folder of this machine only its name, since outputs are published."""
    path = Path(where)
    return path.name if path.is_absolute() or path.exists() or len(path.parts) > 2 else where


def _lazy(tokenizer: Any, where: str, remote: bool) -> LazyTokenizer:
    """The tokenizer given, or that of the model. A class's name is no place for one; a folder or a hub id is."""
    from .calibration.user_data import LazyTokenizer

    return LazyTokenizer(tokenizer, where if Path(where).is_dir() or "/" in where else None, remote)


def _tell(report: CalibrationReport | None, progress: bool) -> None:
    """Losses, and what was out of the ordinary."""
    text = "" if report is None else report.render()
    if text and progress:
        _say(f"what calibration did:\n{text}")


def _stream(config: RunConfig, rows: list[list[int]] | None, progress: bool) -> Path:
    """From disk to disk."""
    from . import engine

    def show(plan: Any) -> None:
        for warning in plan.warnings:
            _say(f"warning: {warning}")

    result = engine.run(config, rows=rows, show=show, progress=progress)
    _tell(result.report, progress)
    if not result.audit.ok:
        found = result.audit.problems
        more = f"; and {len(found) - 5} more (quantkit audit)" if len(found) > 5 else ""
        raise QuantkitError(f"{result.output}: was written, but is not right: {'; '.join(found[:5])}{more}")
    _say(f"written to {result.output} ({sum(result.seconds.values()):.1f} s)")
    return result.output


def _save_tokenizer(tokenizer: Any, where: str, output: Path, remote: bool) -> None:
    """Beside the model, if there is one."""
    try:
        _lazy(tokenizer, where, remote).load().save_pretrained(output)
    except (QuantkitError, AttributeError) as error:
        _say(f"no tokenizer is in {output}: {error}")


def _quantize(model: Any, config: RunConfig, rows: list[list[int]] | None, progress: bool) -> None:
    """In place, once everything is computed."""
    from . import engine
    from .data_free import data_free
    from .from_statistics import from_statistics, opened
    from .live_output import LiveOutput, LiveSink
    from .models.live import LiveCheckpoint
    from .models.skeleton import Skeleton
    from .plan import build_plan

    checkpoint = LiveCheckpoint(model)
    plan = build_plan(config, cast("Checkpoint", checkpoint))
    for warning in plan.warnings:
        _say(f"warning: {warning}")
    sink = LiveSink()
    progress = progress and distributed.ranks().first
    report = None
    if not plan.recipe.needs_data:
        data_free(plan, checkpoint, sink, progress=progress)
    else:
        skeleton = Skeleton(checkpoint.folder, checkpoint.names(), dtype=engine.forward_dtype(config), like=model)
        if rows is not None:
            report = engine.calibrate(plan, skeleton, checkpoint, rows, sink, progress=progress)
        else:
            with opened(plan) as plan:
                assert plan.statistics is not None
                report = from_statistics(plan, skeleton, checkpoint, plan.statistics, sink, progress=progress)
        _tell(report, progress)
    LiveOutput(checkpoint, config, sink, report).install(plan)
