"""The pipeline: config -> plan -> checkpoint -> sweep -> modifiers -> formats -> checkpoint -> audit."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from . import __version__, distributed
from .attentions import cache_shape
from .audit import AuditResult, audit
from .checkpoint.dtypes import torch_dtype
from .checkpoint.hub import resolve_model
from .checkpoint.writer import CheckpointWriter
from .config.run_config import FP8_SOURCE, RunConfig
from .data_free import data_free, own_tensors
from .distributed import ONE, Ranks
from .errors import DistributedError
from .fingerprint import (
    config_fingerprint,
    data_fingerprint,
    machine_fingerprint,
    source_fingerprint,
    statistics_fingerprint,
)
from .formats.attention import query_scale
from .formats.folded import Folded
from .formats.fp8_source import open_source
from .parallel import use_threads
from .plan import Plan, build_plan, config_bytes
from .report.calibration import CalibrationReport
from .report.model_card import model_card
from .report.progress import Progress
from .resume import Resumption
from .resume_ranks import SharedResumption
from .rounding import not_finite, round_weight
from .startup import quick_imports

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ._host import Weight
    from .calibration.layer import SweepReport
    from .models.skeleton import Skeleton
    from .models.skeleton import WeightSource as LayerSource
    from .modifiers.sink import Sink
    from .quantized import QuantizedTensor

RECORD, REPORT = "quantkit_config.json", "quantkit_report.json"


@dataclass(frozen=True)
class RunResult:
    """Where the output lies, what the audit found, how long each stage took in seconds, and what calibration did."""

    output: Path
    audit: AuditResult
    seconds: dict[str, float]
    report: CalibrationReport | None = None


@contextmanager
def open_plan(config: RunConfig, ranks: Ranks = ONE, *, planned_ranks: int | None = None) -> Iterator[Plan]:
    """Resolve the model, open its checkpoint and make the plan; the checkpoint is closed at the end. `planned_ranks`:
    as if so many processes were to work on it, on this machine.
    """
    if ranks.first:  # what has to be fetched is fetched once
        resolve_model(config.model.model_path, cache_dir=config.model.cache_dir)
    ranks.barrier()
    folder = resolve_model(config.model.model_path, cache_dir=config.model.cache_dir)
    with open_source(folder) as checkpoint:
        world = planned_ranks or ranks.world
        here = world if ranks.world == 1 else int(os.environ.get("LOCAL_WORLD_SIZE", world))
        plan = build_plan(config, checkpoint, world, here)
        if config.calibration.statistics is None or not plan.recipe.needs_data:
            yield plan
            return
        from .from_statistics import opened

        with opened(plan) as plan:
            yield plan


def run(
    config: RunConfig,
    *,
    rows: Sequence[Sequence[int]] | None = None,
    statistics: Path | str | None = None,
    show: Callable[[Plan], None] | None = None,
    progress: bool = True,
    restart: bool = False,
) -> RunResult:
    """Quantize as `config` says: plan, write, audit. `show` is called with the plan before work starts; `rows` of token
    ids take the place of the dataset section, and `statistics`, a folder that `quantkit calibrate` made, that of
    running the model.

    Raises a QuantkitError when something does not fit, before anything is written; the output folder appears
    only when it is complete. Where an earlier process was stopped on its way, this one goes on, unless anything that
    the result depends on has changed (CheckpointError) or `restart` is asked for. Started by torchrun, all processes
    work on it together; all get the result.
    """
    ranks = distributed.ranks()
    try:
        return _run(config, rows, statistics, show if ranks.first else None, progress and ranks.first, restart, ranks)
    except BaseException as error:
        ranks.failed(error)
        raise


def _run(
    config: RunConfig,
    rows: Sequence[Sequence[int]] | None,
    statistics: Path | str | None,
    show: Callable[[Plan], None] | None,
    progress: bool,
    restart: bool,
    ranks: Ranks,
) -> RunResult:
    seconds: dict[str, float] = {}
    started = time.perf_counter()

    def lap(stage: str) -> None:
        nonlocal started
        now = time.perf_counter()
        seconds[stage] = now - started
        started = now

    if config.recipe.needs_data or config.compression.disable_level != "L0":
        use_threads(config.global_.num_threads)
    if statistics is not None:
        config = replace(config, calibration=replace(config.calibration, statistics=str(statistics)))
    if config.compression.disable_level != "L0":
        from .fall_back import with_level

        config = with_level(config, rows, progress=progress, ranks=ranks)
    with open_plan(config, ranks) as plan:
        if show is not None:
            show(plan)
        if ranks.first:
            plan.require_room()
        job = _Calibration(plan, rows, ranks) if plan.recipe.needs_data else None
        resumption = Resumption(
            plan.layout,
            _fingerprint(plan, job),
            layers=job.skeleton.num_layers if job else 0,
            restart=restart,
            tell=lambda text: tqdm.write(f"quantkit: {text}", file=sys.stderr),
            pending=_pending(plan),
        )
        lap("plan")
        with closing(resumption), ExitStack() as stack:
            writer = _writer(plan, resumption, ranks, stack)
            report = CalibrationReport() if job else None
            if writer is None:  # an earlier process had finished, and rank 0 looks at what it left
                pass
            elif not writer.published:
                _made(plan, writer, resumption, job, report, progress, lap, ranks)
                lap("write")
            elif report is not None:
                from .calibration.layer import SweepReport

                seen = SweepReport(0)
                resumption.report(report)
                resumption.restore(None, seen)
                _complete(plan, seen, report)
            audited = None
            if ranks.first and writer is not None:
                try:
                    audited = writer.output, audit(writer.output, plan.checkpoint, progress=progress)
                finally:
                    # Whoever stops the audit by a signal has a finished output.
                    writer.seal()
            output, result = ranks.broadcast(audited)
            lap("audit")
    return RunResult(output, result, seconds, report)


class _Calibration:
    """The model without weights, and the rows that it is calibrated with."""

    def __init__(self, plan: Plan, rows: Sequence[Sequence[int]] | None, ranks: Ranks) -> None:
        with quick_imports():
            from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

            from .calibration.dataset import load_rows, load_tokenizer
            from .models.skeleton import Skeleton

        config, checkpoint = plan.config, plan.checkpoint
        remote = config.model.trust_remote_code
        self.skeleton = Skeleton(
            checkpoint.folder, checkpoint.parts, dtype=forward_dtype(config), trust_remote_code=remote
        )
        if rows is None and plan.statistics is None and ranks.first:
            assert config.dataset is not None
            tokenizer = load_tokenizer(checkpoint.folder, trust_remote_code=remote)
            rows = load_rows(config.dataset, tokenizer, seed=config.global_.seed, vocab_size=self.skeleton.vocab_size)
        self.rows = ranks.broadcast(rows) or ()


def _fingerprint(plan: Plan, job: _Calibration | None) -> dict[str, str]:
    """All that the output depends on."""
    return {
        **machine_fingerprint(forwards=job is not None),
        **config_fingerprint(_options(plan)),
        **source_fingerprint(plan.checkpoint),
        **(data_fingerprint(job.rows) if job is not None and job.rows else {}),
        **(statistics_fingerprint(plan.statistics.folder) if plan.statistics is not None else {}),
        "output layout": hashlib.sha256(plan.layout.to_json().encode()).hexdigest()[:16],
    }


def _made(
    plan: Plan,
    writer: CheckpointWriter,
    resumption: Resumption,
    job: _Calibration | None,
    report: CalibrationReport | None,
    progress: bool,
    lap: Callable[[str], None],
    ranks: Ranks,
) -> None:
    """All of the output, from where an earlier process left it."""
    sink, copy = WrittenOutput(plan, writer), _copier(plan, writer)
    keeper: Resumption | SharedResumption = resumption
    if ranks.world > 1:
        keeper = SharedResumption(resumption if ranks.first else None, writer, ranks)
    try:
        if job is not None:
            from .formats.source import WeightSource

            for name in own_tensors({name: plan.checkpoint.tensors[name] for name in plan.carried}, ranks):
                if not keeper.has([name]):
                    copy(name)
            from .modifiers.division import OwnSink

            source, own = WeightSource(plan.checkpoint), OwnSink(sink, list(plan.modules), ranks)
            if plan.statistics is not None:
                from .from_statistics import from_statistics

                from_statistics(
                    plan,
                    job.skeleton,
                    source,
                    plan.statistics,
                    own,
                    progress=progress,
                    report=report,
                    keeper=keeper,
                    ranks=ranks,
                )
            else:
                calibrate(
                    plan,
                    job.skeleton,
                    source,
                    job.rows,
                    own,
                    progress=progress,
                    scratch=writer.working_folder,
                    report=report,
                    keeper=keeper,
                    ranks=ranks,
                )
        else:
            data_free(plan, plan.checkpoint, sink, copy=copy, progress=progress, ranks=ranks, keeper=keeper)
        lap("quantize")
        for names in ranks.gather([] if ranks.first else writer.flush()):
            if ranks.first:
                writer.written_elsewhere(names)
        if ranks.first:
            side_files(plan, writer, report)
            writer.finish(seal=False)
        ranks.barrier()
    except BaseException as error:
        resumption.keep(error)
        raise


def _writer(plan: Plan, resumption: Resumption, ranks: Ranks, stack: ExitStack) -> CheckpointWriter | None:
    """Rank 0 makes the output's files, and the others join; all have to mean the same output. None where there is
    nothing to write, but for rank 0.
    """
    config = plan.config
    headers = hashlib.sha256(b"".join(shard.header for shard in plan.layout.shards)).hexdigest()
    meant = ranks.gather((str(config.output_dir.absolute()), headers))
    for rank, theirs in enumerate(meant):
        if theirs != meant[0]:
            what = f"write {theirs[0]}" if theirs[0] != meant[0][0] else "make tensors of other names or shapes"
            raise DistributedError(
                f"rank {rank} was given another job than rank 0: it would {what}; start all with the same "
                "configuration and model"
            )
    writer = None
    if ranks.first:
        writer = stack.enter_context(resumption.open(config.output_dir, config.global_.overwrite))
    published = ranks.broadcast(writer is not None and writer.published)
    if writer is None and not published:
        writer = stack.enter_context(CheckpointWriter.join(plan.layout, config.output_dir, _pending(plan)))
    return writer


def _pending(plan: Plan) -> int:
    """Bytes that may wait for the disk, which count, too; calibration is slower than any disk."""
    return (16 if plan.recipe.needs_data else 64) << 20


class WrittenOutput:
    """A sink that packs results as the format wants them and hands them to the writer."""

    def __init__(self, plan: Plan, writer: CheckpointWriter) -> None:
        self.plan, self.writer = plan, writer
        self._folded: dict[str, Folded] = {}
        self._biases: dict[str, Tensor] = {}

    def weight(self, module: str, quantized: QuantizedTensor) -> None:
        tensors = self.plan.format.pack_weight(module, quantized, self.plan.scale_dtype(module))
        for name, tensor in tensors.items():
            self.writer.write(name, tensor)
        inputs = self.plan.modules[module].scheme.input_activations
        if self.plan.format.FOLDS and inputs is not None and not inputs.dynamic:
            self._folded[module] = Folded.of(quantized, torch_dtype(self.plan.modules[module].dtype))

    def rounded(self, module: str, weight: Weight) -> None:
        """See `data_free.RowSink`."""
        planned, fmt = self.plan.modules[module], self.plan.format
        rows = fmt.row_tensors(module, planned.scheme, planned.rows, planned.cols)
        assert rows is not None
        names = [rows.codes, rows.scale, *([rows.zero_point] if rows.zero_point else []), *rows.constants]
        with self.writer.in_place(names) as places:
            bad = round_weight(
                weight,
                planned.scheme.weights,
                rows,
                places,
                scale_dtype=fmt.scale_dtype(planned.scheme, planned.dtype),
                packed=fmt.packs(planned.scheme),
            )
            if bad is not None:
                raise not_finite(module, bad, planned.rows)

    def input(self, module: str, scale: Tensor, zero_point: Tensor | None) -> None:
        folded = self._folded.pop(module, None)
        if folded is not None:
            folded.bias = self._bias(module)
        args = self.plan.modules[module].scheme.input_activations
        for name, tensor in self.plan.format.pack_activations(module, scale, zero_point, folded, args).items():
            self.writer.write(name, tensor)

    def _bias(self, module: str) -> Tensor | None:
        """As it is written: what a transform made of it, or the source's."""
        name = f"{module}.bias"
        if name in self._biases:
            return self._biases.pop(name)
        return self.plan.checkpoint.tensor(name) if name in self.plan.checkpoint.tensors else None

    def tensor(self, name: str, value: Tensor) -> None:
        self.writer.write(name, value)
        if self.plan.format.FOLDS and name.endswith(".bias"):
            self._biases[name] = value

    def query(self, attention: str, scale: Tensor) -> None:
        for name, tensor in query_scale(attention, scale).items():
            self.writer.write(name, tensor)

    def cache(self, attention: str, key_scale: Tensor, value_scale: Tensor) -> None:
        shape = cache_shape(self.plan.checkpoint, attention)
        for name, tensor in self.plan.format.kv_scales(attention, key_scale, value_scale, shape).items():
            self.writer.write(name, tensor)


def calibrate(
    plan: Plan,
    skeleton: Skeleton,
    source: LayerSource,
    rows: Sequence[Sequence[int]],
    sink: Sink,
    *,
    progress: bool = True,
    scratch: Path | None = None,
    ranks: Ranks = ONE,
    report: CalibrationReport | None = None,
    keeper: Resumption | SharedResumption | None = None,
) -> CalibrationReport:
    """A recipe with data: layer by layer, one sweep for everything in it. `rows` of token ids, each of at least two.
    `scratch`: a folder for hidden states, if they go to disk; a temporary one without. `report` is filled in and given
    back; `keeper`: what an earlier process has done.
    """
    from .calibration.batches import batches
    from .calibration.sweep import sweep
    from .modifiers.pipeline import Pipeline

    report = CalibrationReport() if report is None else report
    if keeper is not None:
        keeper.report(report)
    pipeline = Pipeline(plan, sink, report, ranks)
    with ExitStack() as stack:
        if plan.means.offload == "memory":
            scratch = None
        elif scratch is None:
            scratch = Path(stack.enter_context(TemporaryDirectory(prefix="quantkit-")))
        bar = stack.enter_context(Progress("calibrate", total=0, unit="layer", enabled=progress))
        report.listener = bar.note
        seen = sweep(
            skeleton,
            source,
            batches(rows),
            pipeline,
            progress=bar,
            all_experts=plan.recipe.all_experts,
            forwards=plan.means.forwards,
            offload=scratch,
            expert_group=plan.means.experts,
            keep_memory=plan.means.kept,
            keeper=keeper,
            ranks=ranks,
        )
        report.listener = None
    for modules, smoothings, tokens, silent in ranks.gather(
        (report.modules, report.smoothings, seen.expert_tokens, seen.silent_experts)
    ):
        report.take_in(modules, smoothings)
        seen.expert_tokens |= {name: count for name, count in tokens.items() if name not in seen.expert_tokens}
        seen.silent_experts += [name for name in silent if name not in seen.silent_experts]
    _complete(plan, seen, report)
    return report


def _complete(plan: Plan, seen: SweepReport, report: CalibrationReport) -> None:
    """What the sweep saw, to the report."""
    report.tokens, report.expert_tokens = seen.tokens, seen.expert_tokens
    report.once, report.twice = seen.once, seen.twice
    report.silent_experts = seen.silent_experts
    # Not in the order in which they were done, which depends on how many experts fit into memory.
    report.sort(list(plan.modules), [place.smooth for places in plan.smoothings.values() for place in places])


def forward_dtype(config: RunConfig) -> torch.dtype | None:
    """That of the calibration forward; None: the checkpoint's own."""
    import torch

    name = config.model.torch_dtype
    return None if name in ("auto", FP8_SOURCE) else getattr(torch, name)


def _copier(plan: Plan, writer: CheckpointWriter) -> Callable[[str], None]:
    return lambda name: writer.copy(name, plan.checkpoint.tensors[name], plan.checkpoint)


def side_files(plan: Plan, writer: CheckpointWriter, report: CalibrationReport | None) -> None:
    """Everything in an output that is no weight: what the source brings along, and what tells how it was made."""
    for path in plan.checkpoint.side_files:
        if path.name not in (RECORD, REPORT):  # of an earlier job on this model; this one writes its own
            writer.copy_side_file(path)
    writer.side_file("README.md", model_card(plan).encode())
    writer.side_file(RECORD, (json.dumps(_record(plan), indent=2) + "\n").encode())
    if report is not None:
        writer.side_file(REPORT, (report.to_json() + "\n").encode())
    schemes = {name: module.scheme for name, module in plan.modules.items()}
    block = plan.config_json["quantization_config"]
    for name, data in plan.format.side_files(block, plan.layout.tensors, schemes).items():
        writer.side_file(name, data)
    writer.side_file("config.json", config_bytes(plan))


def _record(plan: Plan) -> dict[str, Any]:
    """What made this output: every resolved option and the versions that took part. Paths of this machine are cut to
    their last part, since outputs are published, and what is this machine's (its memory) is left out.
    """
    return {
        "quantkit": __version__,
        "python": platform.python_version(),
        "torch": version("torch"),  # a run without data does not import it
        "platform": sys.platform,
        "scheme": plan.recipe.name,
        **({} if plan.statistics is None else {"statistics": plan.statistics.contents.record()}),
        **plan.record(),
        "config": _options(plan),
    }


def _options(plan: Plan) -> dict[str, Any]:
    options = plan.config.to_dict()
    del options["global"]["save_path"], options["global"]["memory_budget"], options["calibration"]
    options["compression"].get("quantization", {}).pop("low_memory", None)
    for section, key in (("model", "model_path"), ("model", "cache_dir"), ("dataset", "data_path")):
        value = options.get(section, {}).get(key)
        if value is not None and Path(value).exists():
            options[section][key] = Path(value).name
    return options
