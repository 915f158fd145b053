"""Recipes with data, from statistics that `quantkit calibrate` saved: the model is not run again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from .attentions import attention_modules, kv_heads, query_heads
from .calibration.fingerprint import config_hash, model_hash
from .calibration.replay import replay
from .calibration.statistics import Wants
from .calibration.statistics_check import StatisticsFile
from .config.recipe import AWQModifier, GPTQModifier
from .distributed import ONE, Ranks
from .errors import PlanError
from .modifiers.pipeline import Pipeline
from .plan import Plan, collapse
from .report.calibration import CalibrationReport
from .report.progress import Progress

if TYPE_CHECKING:
    from .models.skeleton import Skeleton
    from .models.skeleton import WeightSource as LayerSource
    from .modifiers.sink import Sink
    from .resume import Resumption
    from .resume_ranks import SharedResumption


@contextmanager
def opened(plan: Plan) -> Iterator[Plan]:
    """`plan` with the statistics that its configuration names, which are there and fit it."""
    with StatisticsFile(str(plan.config.calibration.statistics)) as file:
        require(file, plan, Pipeline(plan, cast("Sink", None), CalibrationReport()))
        yield replace(plan, statistics=file)


def from_statistics(
    plan: Plan,
    skeleton: Skeleton,
    source: LayerSource,
    file: StatisticsFile,
    sink: Sink,
    *,
    progress: bool = True,
    report: CalibrationReport | None = None,
    keeper: Resumption | SharedResumption | None = None,
    ranks: Ranks = ONE,
) -> CalibrationReport:
    """`plan` done layer by layer with the statistics in `file`, which `require` has let pass. `report` is filled in and
    given back; `keeper`: what an earlier process has done. Of several `ranks` all read all; they share out the work.
    """
    report = CalibrationReport() if report is None else report
    if keeper is not None:
        keeper.report(report)
    # Whose experts may need what all of the layer's have seen.
    together = any(
        isinstance(m, GPTQModifier) and m.low_data == "all_tokens" and m.min_tokens_per_module > 0
        for m in plan.recipe.modifiers
    )
    with Progress("quantize", total=0, unit="layer", enabled=progress) as bar:
        report.listener = bar.note
        pipeline = Pipeline(plan, sink, report, ranks)
        seen = replay(skeleton, source, file, pipeline, together=together, progress=bar, keeper=keeper)
        report.listener = None
    report.tokens, report.expert_tokens = seen.tokens, seen.expert_tokens
    report.silent_experts = seen.silent_experts
    return report


def require(file: StatisticsFile, plan: Plan, pipeline: Pipeline) -> None:
    """PlanError unless `file` is of the plan's model and holds what its recipe looks at."""
    where, found, family = file.folder, file.contents.fingerprint, plan.family
    live = hasattr(plan.checkpoint, "parameters")
    if model_hash(plan.checkpoint, family) != found.model:
        raise PlanError(
            f"{where}: the statistics are of another model than {plan.checkpoint.folder}: its tensors' names, shapes, "
            "dtypes or values differ; run quantkit calibrate on this one"
        )
    if not live and config_hash(plan.checkpoint.config) != found.config:
        raise PlanError(
            f"{where}: the statistics are of a model whose config.json is not that of {plan.checkpoint.folder}; run "
            "quantkit calibrate on this one"
        )
    _check_names(file, plan)
    wanted: Mapping[str, Wants] = {
        name: pipeline.statistics.get(name, Wants()) | pipeline.ranges.get(name, Wants())
        for name in (*pipeline.statistics, *pipeline.ranges)
    }
    silent = set(file.contents.silent)
    _refuse(
        where, [n for n in wanted if n not in file.inputs and n not in silent], "inputs", "run quantkit calibrate anew"
    )
    for kind, need in (("gram", "Gram matrices"), ("histogram", "histograms")):
        if kind not in file.contents.kinds:
            lacking = [name for name, w in wanted.items() if getattr(w, kind)]
            _refuse(where, lacking, need, f"run quantkit calibrate with {kind} in calibration.gather")
    lacking = [name for name in pipeline.caches if name not in file.contents.caches]
    _refuse(where, lacking, "keys and values", "run quantkit calibrate with kv_cache in calibration.gather")
    lacking = [name for name in pipeline.queries if name not in file.contents.queries]
    _refuse(where, lacking, "queries", "run quantkit calibrate with queries in calibration.gather")
    if plan.kv_cache is not None and plan.kv_cache.strategy == "channel":
        _refuse(where, list(pipeline.caches), "channels of keys and values", "leave calibration.statistics out")
    if plan.recipe.all_experts != found.all_experts and any(family.is_expert(name) for name in wanted):
        saw, wants = ("all tokens", "false") if found.all_experts else ("the tokens routed to them", "true")
        raise PlanError(
            f"{where}: experts saw {saw}, and the recipe has moe_calibrate_all_experts: "
            f"{str(plan.recipe.all_experts).lower()}; run quantkit calibrate with this recipe, or set it to "
            f"{'true' if wants == 'false' else 'false'}"
        )
    _check_smoothed(file, plan, pipeline)


def _refuse(where: object, names: list[str], what: str, advice: str) -> None:
    if names:
        kinds = Counter(collapse(name) for name in names)
        listed = ", ".join(f"{name} x{count}" if count > 1 else name for name, count in list(kinds.items())[:5])
        raise PlanError(f"{where}: the recipe needs {what} of {listed}, which are not in it; {advice}")


def _check_names(file: StatisticsFile, plan: Plan) -> None:
    """That all it names are Linears and attention modules of the model, as wide as it says."""
    tensors, family, config = plan.checkpoint.parts, plan.family, plan.checkpoint.config
    known = attention_modules(family, tensors)
    for held, heads in ((file.contents.caches, kv_heads(config)), (file.contents.queries, query_heads(config))):
        for name, count in held.items():
            if name not in known:
                file.fail(f"'{name:.200}' is no attention of {plan.checkpoint.folder}")
            if heads not in (None, count):
                file.fail(f"'{name}' has {heads} heads, and statistics of {count}")
    for name in (*file.inputs, *file.contents.silent):
        info = tensors.get(f"{name}.weight")
        if info is None or not family.is_linear(f"{name}.weight", info.shape):
            file.fail(f"'{name:.200}' is no Linear of {plan.checkpoint.folder}")
        if name in file.inputs and file.inputs[name].channels != info.shape[1]:
            file.fail(f"'{name}' has {info.shape[1]} inputs, and statistics of {file.inputs[name].channels}")
        if name not in file.inputs and not family.is_expert(name):
            file.fail(f"'{name}' is said to have read nothing, and is no expert")


def _check_smoothed(file: StatisticsFile, plan: Plan, pipeline: Pipeline) -> None:
    """Smoothing changes ranges in a way that is known, histograms and moving averages in one that is not."""
    for modifier in plan.recipe.modifiers:
        if isinstance(modifier, AWQModifier) and modifier.loss == "parent":
            raise PlanError(f"{file.folder}: AWQModifier.loss: parent runs the model; from statistics use loss: gram")
    smoothed = {name for places in plan.smoothings.values() for place in places for name in place.balance}
    bad = [n for n, w in pipeline.ranges.items() if n in smoothed and (w.histogram or w.averages)]
    if bad:
        observer = plan.modules[bad[0]].scheme.input_activations
        raise PlanError(
            f"{file.folder}: {bad[0]} is smoothed, and observer {observer.observer if observer else '?'} of its inputs "
            "looks at more than their range, which statistics do not tell once channels are divided; use observer: "
            "minmax, or run without --statistics"
        )
