"""`quantkit calibrate`: run the model once, in full precision, and save what the inputs of its Linears are like."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from . import distributed
from .attentions import attention_modules, kv_heads, query_heads
from .calibration.batches import batches
from .calibration.dataset import load_rows, load_tokenizer
from .calibration.fingerprint import Fingerprint, config_hash, data_of, model_hash
from .calibration.layer import Layer
from .calibration.statistics import Statistics, Wants
from .calibration.statistics_file import Contents, Input, StatisticsWriter, cache_tensors, query_tensor, wants
from .calibration.sweep import sweep
from .checkpoint.hub import resolve_model
from .config.presets import preset
from .config.recipe import GPTQModifier, QuantizationModifier
from .engine import forward_dtype
from .errors import ConfigError, PlanError
from .estimate import memory_available
from .formats.fp8_source import open_source
from .formats.source import WeightSource
from .memory import Demand, Means, choose
from .models.attention import shows_queries
from .models.families import Family
from .models.skeleton import Skeleton
from .plan import PlannedModule
from .report.progress import Progress
from .report.table import size

if TYPE_CHECKING:
    from .calibration.hooks import CacheRecorder
    from .checkpoint.reader import Checkpoint
    from .config.run_config import RunConfig


class Gatherer:
    """A sweep's visitor that changes nothing and writes what it is given; see `calibration.layer.Visitor`.

    One forward a layer does, but for the Linears in `before`: where experts are to see all tokens, what they give then
    is not what goes on; and where they come in groups, those of one group are written before the next one comes.
    """

    pools_below, together = 0, False

    def __init__(
        self,
        gathered: Mapping[str, Wants],
        before: Collection[str],
        caches: Collection[str],
        queries: Collection[str],
        writer: StatisticsWriter,
    ) -> None:
        self.statistics = {name: wanted for name, wanted in gathered.items() if name in before}
        self.ranges = {name: wanted for name, wanted in gathered.items() if name not in before}
        self.caches, self.queries = caches, queries
        self._writer = writer

    def across(self, index: int) -> str | None:
        """Nothing is."""
        return None

    def norms(self, index: int) -> Mapping[str, Collection[str]]:
        """None."""
        return {}

    def prepare(self, layer: Layer) -> None:
        """Weights stay as they are."""

    def finish(self, layer: Layer, statistics: Mapping[str, Statistics]) -> None:
        """Written."""
        self._writer.add(statistics, {})

    def observe(self, layer: Layer, ranges: Mapping[str, Statistics], caches: Mapping[str, CacheRecorder]) -> None:
        """Written."""
        self._writer.add(ranges, {name: recorder.heads() for name, recorder in caches.items()})


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
) -> Path:
    """Save the statistics of `config`'s model and data, of every kind in `calibration.gather`, to the folder `output`,
    which appears once it is complete; `rows` of token ids take the place of the dataset section.

    Of the recipe only moe_calibrate_all_experts matters. Raises a QuantkitError for what does not fit. Of several
    processes that torchrun started the first does all of it, and the others wait.
    """
    ranks = distributed.ranks()
    try:
        found: Path = ranks.broadcast(_calibrate(config, output, overwrite, rows, progress) if ranks.first else None)
    except BaseException as error:
        ranks.failed(error)
        raise
    return found


def _calibrate(
    config: RunConfig, output: Path | None, overwrite: bool, rows: Sequence[Sequence[int]] | None, progress: bool
) -> Path:
    folder = resolve_model(config.model.model_path, cache_dir=config.model.cache_dir)
    remote, seed, kinds = config.model.trust_remote_code, config.global_.seed, config.calibration.gather
    if config.global_.num_threads is not None:
        import torch

        torch.set_num_threads(config.global_.num_threads)
    with open_source(folder) as checkpoint:
        skeleton = Skeleton(folder, checkpoint.tensors, dtype=forward_dtype(config), trust_remote_code=remote)
        if rows is None:
            if config.dataset is None:
                raise ConfigError(f"{config.source}: the section dataset is missing; it says what to calibrate with")
            tokenizer = load_tokenizer(folder, trust_remote_code=remote)
            rows = load_rows(config.dataset, tokenizer, seed=seed, vocab_size=skeleton.vocab_size)
        family, shapes = skeleton.family, {name: info.shape for name, info in checkpoint.tensors.items()}
        linears = [
            name
            for index in range(skeleton.num_layers)
            for name in skeleton.linears(index)
            if family.is_linear(f"{name}.weight", shapes.get(f"{name}.weight", ()))
        ]
        attentions = attention_modules(family, shapes)
        queries = attentions if "queries" in kinds and shows_queries(skeleton.model) else ()
        caches = attentions if "kv_cache" in kinds else queries
        fingerprint = Fingerprint(
            model_hash(checkpoint, family),
            config_hash(checkpoint.config),
            str(skeleton.dtype).removeprefix("torch."),
            config.recipe.all_experts,
        )
        contents = Contents(fingerprint, kinds, [data_of(rows, seed)])
        expected = expected_bytes(family, linears, shapes, kinds)
        expected += sum(t.nbytes for name in caches for t in cache_tensors(name, kv_heads(checkpoint.config) or 1))
        expected += sum(query_tensor(name, query_heads(checkpoint.config) or 1).nbytes for name in queries)
        with StatisticsWriter(
            output or statistics_folder(config), contents, overwrite=overwrite, expected=expected
        ) as writer:
            every, how = config.recipe.all_experts, _means(config, checkpoint, family, linears)
            routed = {
                name
                for index, experts in enumerate(skeleton.experts)
                for name in skeleton.linears(index)
                if experts and (every or how.experts is not None)
            }
            visitor = Gatherer(dict.fromkeys(linears, wants(kinds)), routed, caches, queries, writer)
            with Progress("calibrate", total=0, unit="layer", enabled=progress) as bar:
                sweep(
                    skeleton,
                    WeightSource(checkpoint),
                    batches(rows),
                    visitor,
                    progress=bar,
                    all_experts=every,
                    offload=writer.working_folder if how.offload == "disk" else None,
                    expert_group=how.experts,
                    keep_memory=how.kept,
                )
            return writer.finish()


class _Gathering(Demand):
    """What a calibration takes: statistics of every input, and no weight is worked on."""

    def held(self, forwards: int | str) -> int:
        """Statistics are all that is kept of an input."""
        return 0

    @cached_property
    def _work(self) -> int:
        """The half of a Gram matrix that is stored."""
        return max((2 * cols * cols for cols in self.inputs.values()), default=0)


def _means(config: RunConfig, checkpoint: Checkpoint, family: Family, linears: Sequence[str]) -> Means:
    """How a calibration keeps to its memory; PlanError if it cannot. None of it changes what is saved."""
    scheme = preset("W8A16")
    kind = GPTQModifier if "gram" in config.calibration.gather else QuantizationModifier
    modifier = kind(scheme=scheme)
    modules = {
        name: PlannedModule(name, *info.shape, info.dtype, scheme, modifier)
        for name in linears
        if len((info := checkpoint.tensors[f"{name}.weight"]).shape) == 2
    }
    choice = choose(_Gathering(config, checkpoint, family, modules, ()), memory_available())
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
