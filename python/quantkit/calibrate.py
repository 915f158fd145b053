"""`quantkit calibrate`: run the model once, in full precision, and save what the inputs of its Linears are like."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from . import distributed
from .attentions import attention_modules, kv_heads, query_heads
from .calibration.batches import batches
from .calibration.dataset import load_rows, load_tokenizer
from .calibration.fingerprint import Fingerprint, config_hash, data_of, model_hash
from .calibration.gatherer import Gatherer
from .calibration.statistics_file import Contents, Input, cache_tensors, query_tensor, wants
from .calibration.statistics_writer import JoinedFolder, StatisticsWriter, is_part
from .calibration.sweep import sweep
from .checkpoint.hub import resolve_model
from .config.presets import preset
from .config.recipe import GPTQModifier, QuantizationModifier
from .distributed import Ranks
from .engine import forward_dtype
from .errors import ConfigError, PlanError
from .estimate import memory_available
from .fingerprint import data_fingerprint, machine_fingerprint, source_fingerprint
from .formats.fp8_source import open_source
from .formats.source import WeightSource
from .layer_journal import LayerJournal
from .memory import Demand, Means, choose
from .models.attention import shows_queries
from .models.families import Family
from .models.skeleton import Skeleton
from .parallel import use_threads
from .plan import PlannedModule
from .report.progress import Progress
from .report.table import size
from .resume_ranks import SharedResumption

if TYPE_CHECKING:
    from .calibration.layer import Keeper
    from .checkpoint.reader import Checkpoint
    from .checkpoint.staging import Resume
    from .config.run_config import RunConfig


def statistics_folder(config: RunConfig) -> Path:
    """Where statistics go unless said otherwise: beside the output."""
    return config.output_dir.with_name(f"{config.stem}-statistics")


def calibrate(
    config: RunConfig,
    output: Path | None = None,
    *,
    overwrite: bool = False,
    rows: Sequence[Sequence[int]] | None = None,
    progress: bool = True,
    restart: bool = False,
) -> Path:
    """Save the statistics of `config`'s model and data, of every kind in `calibration.gather`, to the folder `output`,
    which appears once it is complete; `rows` of token ids take the place of the dataset section.

    Of the recipe only moe_calibrate_all_experts matters. Raises a QuantkitError for what does not fit. Where an earlier
    process was stopped on its way, this one goes on, unless anything that the statistics depend on has changed
    (CheckpointError) or `restart` is asked for. Started by torchrun, all processes work on it together.
    """
    ranks = distributed.ranks()
    try:
        return _calibrate(config, output, overwrite, rows, progress and ranks.first, restart, ranks)
    except BaseException as error:
        ranks.failed(error)
        raise


def _calibrate(
    config: RunConfig,
    output: Path | None,
    overwrite: bool,
    rows: Sequence[Sequence[int]] | None,
    progress: bool,
    restart: bool,
    ranks: Ranks,
) -> Path:
    if ranks.first:  # what has to be fetched is fetched once
        resolve_model(config.model.model_path, cache_dir=config.model.cache_dir)
    ranks.barrier()
    folder = resolve_model(config.model.model_path, cache_dir=config.model.cache_dir)
    use_threads(config.global_.num_threads)
    with open_source(folder) as checkpoint, ExitStack() as stack:
        job = _Job(config, checkpoint, rows, ranks)
        journal = writer = None
        if ranks.first:
            journal = stack.enter_context(closing(job.journal(restart)))
            writer = stack.enter_context(journal.open(output or statistics_folder(config), overwrite))
        where, published = ranks.broadcast(None if writer is None else (writer.working_folder, writer.published))
        if published:
            return Path(ranks.broadcast(None if writer is None else writer.seal()))
        keeper: LayerJournal[StatisticsWriter] | SharedResumption | None = journal
        if journal is not None and writer is not None:
            journal.report(writer.written)
            writer.check_written()
        try:
            if ranks.world > 1:
                keeper = SharedResumption(journal, writer or JoinedFolder(where), ranks)
            job.sweep(writer, keeper, where, progress)
            ranks.barrier()
            return Path(ranks.broadcast(None if writer is None else writer.finish()))
        except BaseException as error:
            if journal is not None:
                journal.keep(error)
            raise


class _Job:
    """The model without weights, the rows it is calibrated with, and what is to be known of which Linears."""

    def __init__(
        self, config: RunConfig, checkpoint: Checkpoint, rows: Sequence[Sequence[int]] | None, ranks: Ranks
    ) -> None:
        self.config, self.checkpoint, self.ranks = config, checkpoint, ranks
        folder, remote = checkpoint.folder, config.model.trust_remote_code
        skeleton = Skeleton(folder, checkpoint.tensors, dtype=forward_dtype(config), trust_remote_code=remote)
        self.skeleton, self.kinds = skeleton, config.calibration.gather
        if rows is None and ranks.first:
            if config.dataset is None:
                raise ConfigError(f"{config.source}: the section dataset is missing; it says what to calibrate with")
            tokenizer = load_tokenizer(folder, trust_remote_code=remote)
            rows = load_rows(config.dataset, tokenizer, seed=config.global_.seed, vocab_size=skeleton.vocab_size)
        self.rows: Sequence[Sequence[int]] = ranks.broadcast(rows)
        self.family, self.shapes = skeleton.family, {name: info.shape for name, info in checkpoint.tensors.items()}
        self.linears = [
            name
            for index in range(skeleton.num_layers)
            for name in skeleton.linears(index)
            if self.family.is_linear(f"{name}.weight", self.shapes.get(f"{name}.weight", ()))
        ]
        attentions = attention_modules(self.family, self.shapes)
        self.queries = attentions if "queries" in self.kinds and shows_queries(skeleton.model) else ()
        self.caches = attentions if "kv_cache" in self.kinds else self.queries

    def journal(self, restart: bool) -> LayerJournal[StatisticsWriter]:
        """Of this calibration; it opens the writer."""
        config, checkpoint = self.config, self.checkpoint
        fingerprint = Fingerprint(
            model_hash(checkpoint, self.family),
            config_hash(checkpoint.config),
            str(self.skeleton.dtype).removeprefix("torch."),
            config.recipe.all_experts,
        )
        contents = Contents(fingerprint, self.kinds, [data_of(self.rows, config.global_.seed)])
        expected = expected_bytes(self.family, self.linears, self.shapes, self.kinds)
        heads, asked = kv_heads(checkpoint.config) or 1, query_heads(checkpoint.config) or 1
        expected += sum(t.nbytes for name in self.caches for t in cache_tensors(name, heads))
        expected += sum(query_tensor(name, asked).nbytes for name in self.queries)

        def make(output: Path, overwrite: bool, resume: Resume) -> StatisticsWriter:
            return StatisticsWriter(output, contents, overwrite=overwrite, expected=expected, resume=resume)

        depends_on = {
            "job": "quantkit calibrate",
            **machine_fingerprint(forwards=True),
            **source_fingerprint(checkpoint),
            **data_fingerprint(self.rows),
            "global.seed": str(config.global_.seed),
            "calibration.gather": ", ".join(self.kinds),
            "dtype": fingerprint.dtype,
            "moe_calibrate_all_experts": str(fingerprint.all_experts),
            "model.trust_remote_code": str(config.model.trust_remote_code),
        }
        return LayerJournal(
            make,
            is_part,
            depends_on,
            layers=self.skeleton.num_layers,
            restart=restart,
            tell=lambda text: tqdm.write(f"quantkit: {text}", file=sys.stderr),
        )

    def sweep(self, writer: StatisticsWriter | None, keeper: Keeper | None, scratch: Path, progress: bool) -> None:
        """All layers, from where `keeper` begins."""
        every = self.config.recipe.all_experts
        how = self.ranks.broadcast(self._means() if self.ranks.first else None)
        apart: set[str] = set()
        if every or how.experts is not None or self.ranks.world > 1:
            apart = {
                name
                for index, experts in enumerate(self.skeleton.experts)
                for name in self.skeleton.linears(index)
                if experts and self.family.is_expert(name)
            }
        gathered = dict.fromkeys(self.linears, wants(self.kinds))
        visitor = Gatherer(
            gathered, self.caches, self.queries, self.family, writer, every=every, apart=apart, ranks=self.ranks
        )
        with Progress("calibrate", total=0, unit="layer", enabled=progress) as bar:
            sweep(
                self.skeleton,
                WeightSource(self.checkpoint),
                batches(self.rows),
                visitor,
                progress=bar,
                all_experts=every,
                offload=scratch if how.offload == "disk" else None,
                expert_group=how.experts,
                keep_memory=how.kept,
                ranks=self.ranks,
                keeper=keeper,
            )

    def _means(self) -> Means:
        world, here = self.ranks.world, int(os.environ.get("LOCAL_WORLD_SIZE", self.ranks.world))
        return _means(self.config, self.checkpoint, self.family, self.linears, world, here if world > 1 else 1)


class _Gathering(Demand):
    """What a calibration takes: statistics of every input, and no weight is worked on."""

    def held(self, forwards: int | str) -> int:
        """Statistics are all that is kept of an input."""
        return 0

    @cached_property
    def _work(self) -> int:
        """The half of a Gram matrix that is stored."""
        return max((2 * cols * cols for cols in self.inputs.values()), default=0)


def _means(
    config: RunConfig, checkpoint: Checkpoint, family: Family, linears: Sequence[str], ranks: int = 1, here: int = 1
) -> Means:
    """How each of `ranks`, `here` of them on this machine, keeps to its memory in a calibration; PlanError if it
    cannot. None of it changes what is saved.
    """
    scheme = preset("W8A16")
    kind = GPTQModifier if "gram" in config.calibration.gather else QuantizationModifier
    modifier = kind(scheme=scheme)
    modules = {
        name: PlannedModule(name, *info.shape, info.dtype, scheme, modifier)
        for name in linears
        if len((info := checkpoint.tensors[f"{name}.weight"]).shape) == 2
    }
    available = memory_available()
    demand = _Gathering(config, checkpoint, family, modules, (), ranks)
    choice = choose(demand, None if available is None else available // here)
    budget = config.global_.memory_budget_bytes
    if budget is not None and choice.peak > budget:
        raise PlanError(
            f"quantkit calibrate needs at least about {size(choice.peak)} of memory and global.memory_budget is "
            f"{size(budget)}; {choice.advice + ', ' if choice.advice else ''}lower dataset.num_samples or "
            "max_seq_length, or raise it"
        )
    return choice.means


def expected_bytes(
    family: Family, linears: Sequence[str], shapes: Mapping[str, tuple[int, ...]], kinds: tuple[str, ...]
) -> int:
    """What the statistics of `linears` take on disk, as far as names tell which of them share an input."""
    shared = {name: group for group in family.fused_sets(linears) for name in group}
    inputs = {shared.get(name, (name,)) for name in linears}
    entries = (Input(group, shapes[f"{group[0]}.weight"][1], 1, 1) for group in inputs)
    return sum(tensor.nbytes for entry in entries for tensor in entry.tensors(kinds))
