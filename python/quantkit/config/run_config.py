"""What a run shall do, with every default filled in. Made from YAML by yaml_file.py, or in Python as it stands.

Each class checks itself and raises FieldError, a ConfigError, with the key at fault. docs/config.md describes the keys.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ..errors import nearest
from .algorithms import KV_STRATEGY_OF, PRESETS, Algorithm, QuantMethod, algorithm_of
from .attention import ANY, AttentionGroup
from .fields import FieldError, require
from .groups import SchemeGroup
from .presets import INT8_STATIC_ASYM
from .recipe import AWQModifier, GPTQModifier, Modifier, Recipe, SmoothQuantModifier
from .schemes import QuantizationArgs

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{kind}": base ** (i + 1) for kind, base in (("B", 1000), ("iB", 1024)) for i, prefix in enumerate("KMGT")
}
_UNITS_BY_CASE = {unit.upper(): factor for unit, factor in _UNITS.items()}
DTYPES = ("auto", "bfloat16", "float16", "float32")
FP8_SOURCE = "fp8"
FORWARDS = ("auto", 1, 2)
OFFLOADS = ("auto", "memory", "disk")
# What `quantkit calibrate` saves of an input besides its ranges, of the KV cache, and of what attention is asked for.
GATHERED = ("gram", "histogram", "kv_cache", "queries")
TEXT_DATASET = "TextDataset"
_EXAMPLE = "  dataset:\n    name: TextDataset\n    data_path: ./examples/data/calibration.jsonl\n    num_samples: 64"


@dataclass(frozen=True)
class GlobalConfig:
    """`global`: where the output goes, and what holds for the whole run."""

    save_path: str = "./output"
    max_shard_size: int | str = "5GB"
    seed: int = 0
    overwrite: bool = False
    num_threads: int | None = None
    calibration_forwards: int | str = "auto"
    memory_budget: int | str | None = None

    def __post_init__(self) -> None:
        require(bool(self.save_path.strip()), "save_path", "is empty; give a folder")
        require(self.seed >= 0, "seed", f"{self.seed} is negative")
        require(self.num_threads is None or self.num_threads > 0, "num_threads", f"{self.num_threads} must be positive")
        require(self.max_shard_bytes > 0, "max_shard_size", f"'{self.max_shard_size}' must be positive")
        budget = self.memory_budget_bytes
        require(budget is None or budget > 0, "memory_budget", f"'{self.memory_budget}' must be positive")
        forwards = self.calibration_forwards
        require(
            forwards in FORWARDS,
            "calibration_forwards",
            f"{forwards!r}: a layer takes 1 forward or 2; use auto, 1 or 2",
        )

    @property
    def max_shard_bytes(self) -> int:
        """`max_shard_size` in bytes."""
        return _bytes("max_shard_size", self.max_shard_size)

    @property
    def memory_budget_bytes(self) -> int | None:
        """`memory_budget` in bytes, None if there is none."""
        return None if self.memory_budget is None else _bytes("memory_budget", self.memory_budget)


def _bytes(key: str, value: int | str) -> int:
    """A size: a number of bytes, with KB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value), re.ASCII)
    factor = _UNITS_BY_CASE.get(found[2].upper()) if found else None
    if found is None or factor is None:
        raise FieldError(key, f"'{value}' is no size; write it like 5GB or 500MiB")
    return int(float(found[1]) * factor)


@dataclass(frozen=True)
class ModelConfig:
    """`model`: which one. `torch_dtype` is that of the calibration forward; weights are read in their own. "fp8" says
    that the checkpoint is in FP8, as AngelSlim wants it said, and means "auto" for the forward.
    """

    model_path: str
    trust_remote_code: bool = False
    torch_dtype: str = "auto"
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        require(bool(self.model_path.strip()), "model_path", "is empty; give a folder, or a hub id (org/name)")
        dtype, known = self.torch_dtype, (*DTYPES, FP8_SOURCE)
        require(
            dtype in known, "torch_dtype", f"no such dtype: '{dtype}'{nearest(dtype, known)}; use {', '.join(known)}"
        )


@dataclass(frozen=True)
class QuantizationConfig:
    """`compression.quantization`: the algorithm by `name`, or a preset by `scheme`, and what to leave out.

    Once made, `name` is spelled as in the table of algorithms and `quant_method` has every default filled in.
    """

    name: str | None = None
    scheme: str | None = None
    bits: int | None = None
    quant_method: QuantMethod = field(default_factory=QuantMethod)
    ignore_layers: tuple[str, ...] = ()
    save_name: str = "compressed-tensors"
    quant_helpers: tuple[str, ...] = ()
    smooth_alpha: float = 0.5
    low_memory: bool = False

    def __post_init__(self) -> None:
        algorithm = self.algorithm
        try:
            method, scheme = algorithm.resolve(self.quant_method)
        except FieldError as error:
            raise FieldError(f"quant_method.{error.key}", error.problem) from None
        bits = scheme.weights.num_bits
        require(
            self.bits in (None, bits),
            "bits",
            f"{self.bits}, but {algorithm.name} makes weights of {bits} bits; leave it out or change the algorithm",
        )
        for i, pattern in enumerate(self.ignore_layers):
            require(bool(pattern.strip()), f"ignore_layers[{i}]", "is empty; give a module name, or re: and a pattern")
        for i, helper in enumerate(self.quant_helpers):
            require(helper == "smooth", f"quant_helpers[{i}]", f"no such helper: '{helper}'; there is smooth")
        require(0 <= self.smooth_alpha <= 1, "smooth_alpha", f"{self.smooth_alpha} is not between 0 and 1")
        is_preset = algorithm.name in PRESETS
        for key, value in (
            ("name", None if is_preset else algorithm.name),
            ("scheme", algorithm.name if is_preset else None),
            ("bits", bits),
            ("quant_method", method),
        ):
            object.__setattr__(self, key, value)

    @property
    def algorithm(self) -> Algorithm:
        """The entry that `name` or `scheme` stands for."""
        return algorithm_of(self.name, self.scheme)

    @property
    def recipe(self) -> Recipe:
        """What AngelSlim's words mean as modifiers: smoothing first if asked for, then the algorithm."""
        method, scheme = self.algorithm.resolve(self.quant_method)
        if self.save_name == "mindie" and self.algorithm.name == "int8_static":
            # Ascend's static inputs always have an offset.
            scheme = replace(scheme, input_activations=INT8_STATIC_ASYM)
        common: dict[str, Any] = {"scheme": scheme, "ignore": self.ignore_layers}
        if method.kv_cache is not None:
            inputs = scheme.input_activations
            # FP8 is what servers read; an int8 cache goes with int8 activations only, as in AngelSlim, and with NPUs.
            integers = self.save_name == "mindie" or (inputs is not None and inputs.type == "int")
            kind: Literal["int", "float"] = "int" if integers else "float"
            cache = QuantizationArgs(8, kind, strategy=KV_STRATEGY_OF[method.kv_cache])
            if method.queries:
                queries, linears = AttentionGroup("queries", (ANY,), cache), SchemeGroup(("Linear",), scheme)
                groups = {scheme.name: linears, queries.name: queries}
                common = {"config_groups": groups, "ignore": self.ignore_layers}
            else:
                common["kv_cache_scheme"] = cache
        quantizer: Modifier
        if self.algorithm.modifier is GPTQModifier:
            # AngelSlim's order of columns leaves groups where they are, so no g_idx is written.
            quantizer = GPTQModifier(**common, actorder="weight" if method.actorder else None)
        elif self.algorithm.modifier is AWQModifier:
            quantizer = AWQModifier(**common, clip=bool(method.mse_range))
        else:
            quantizer = self.algorithm.modifier(**common)
        smooth = (SmoothQuantModifier(smoothing_strength=self.smooth_alpha),) if self.quant_helpers else ()
        return Recipe((*smooth, quantizer))


@dataclass(frozen=True)
class CompressionConfig:
    """`compression`: its `name` is quantization (AngelSlim: PTQ, PTQWeightOnly), the only kind that quantkit does. What
    to do stands in `quantization` in AngelSlim's words, or in `recipe` in llm-compressor's; its format is `save_name`.
    `disable_level`: "L3" keeps the three Linears in full precision whose inputs have the longest tails.
    """

    quantization: QuantizationConfig | None = None
    recipe: Recipe | None = None
    name: str | tuple[str, ...] = "PTQ"
    save_name: str | None = None
    disable_level: str = "L0"

    def __post_init__(self) -> None:
        names = (self.name,) if isinstance(self.name, str) else self.name
        for name in names or ("",):
            require(
                name.lower() in ("ptq", "ptqweightonly", "quantization"),
                "name",
                f"no such compression: '{name}'; quantkit does 'quantization', also spelled 'PTQ' and 'PTQWeightOnly'",
            )
        object.__setattr__(self, "name", "PTQ")
        both = self.quantization is not None and self.recipe is not None
        require(not both, "recipe", "and quantization both given; use one of them")
        require(self.quantization is not None or self.recipe is not None, "quantization", "is missing, or recipe")
        misplaced = self.save_name is not None and self.quantization is not None
        level = re.fullmatch(r"L(0|[1-9]\d*)", self.disable_level) is not None
        require(level, "disable_level", f"'{self.disable_level}'; write L0 (none), L1, L2, ...")
        require(not misplaced, "save_name", "goes with recipe; beside quantization use quantization.save_name")


@dataclass(frozen=True)
class DatasetConfig:
    """`dataset`: calibration text. `num_samples` -1: all rows. Rows are cut after `max_seq_length` tokens."""

    data_path: str
    name: str = TEXT_DATASET
    max_seq_length: int = 2048
    num_samples: int = 256
    shuffle: bool = False
    text_column: str = "text"

    def __post_init__(self) -> None:
        known = self.name.lower() in ("textdataset", "text", "auto")
        require(known, "name", f"'{self.name}': only text is calibrated with; use {TEXT_DATASET}")
        object.__setattr__(self, "name", TEXT_DATASET)
        require(bool(self.data_path.strip()), "data_path", "is empty; give a file")
        require(self.max_seq_length > 0, "max_seq_length", f"{self.max_seq_length} must be positive")
        samples = self.num_samples
        require(samples > 0 or samples == -1, "num_samples", f"{samples} must be positive, or -1 for all rows")


@dataclass(frozen=True)
class CalibrationConfig:
    """`calibration`: how activations are looked at. `offload`: where hidden states of all rows lie. `statistics`: a
    folder of `quantkit calibrate`, instead of running the model; `gather`: what that command saves besides ranges.
    """

    offload: str = "auto"
    statistics: str | None = None
    gather: tuple[str, ...] = GATHERED

    def __post_init__(self) -> None:
        where = self.offload
        problem = f"no such place: '{where}'{nearest(where, OFFLOADS)}; hidden states lie in memory or on disk"
        require(where in OFFLOADS, "offload", problem)
        found = self.statistics
        require(found is None or bool(found.strip()), "statistics", "is empty; give a folder of quantkit calibrate")
        for i, kind in enumerate(self.gather):
            problem = f"no such kind: '{kind}'{nearest(kind, GATHERED)}; there are {', '.join(GATHERED)}"
            require(kind in GATHERED and kind not in self.gather[:i], f"gather[{i}]", problem)


# The sections of a file by their key there.
SECTIONS: dict[str, type[Any]] = {
    "global": GlobalConfig,
    "model": ModelConfig,
    "compression": CompressionConfig,
    "dataset": DatasetConfig,
    "calibration": CalibrationConfig,
}


@dataclass(frozen=True)
class RunConfig:
    """A whole run. `source`: the file it was read from; `stem` names the output; `notes`: what to tell the user."""

    global_: GlobalConfig
    model: ModelConfig
    compression: CompressionConfig
    dataset: DatasetConfig | None
    source: Path
    stem: str
    notes: tuple[str, ...] = ()
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)

    def __post_init__(self) -> None:
        if self.runs_model and self.dataset is None:
            raise FieldError(
                "dataset", f"{self.algorithm} looks at activations, and there is no such section; add:\n{_EXAMPLE}"
            )

    @property
    def runs_model(self) -> bool:
        """Whether a run needs data: the recipe looks at activations, and no statistics stand in for them."""
        looks = self.recipe.needs_data or self.compression.disable_level != "L0"
        return looks and self.calibration.statistics is None

    @property
    def output_dir(self) -> Path:
        """Where the quantized model goes: a folder named after the file, in `global.save_path`."""
        return Path(self.global_.save_path).expanduser() / self.stem

    @cached_property
    def recipe(self) -> Recipe:
        """What is done to the model, modifier by modifier."""
        compression = self.compression
        if compression.recipe is not None:
            return compression.recipe
        assert compression.quantization is not None
        return compression.quantization.recipe

    @property
    def algorithm(self) -> str:
        """The algorithm's name, that of the preset, or the recipe's."""
        quantization = self.compression.quantization
        return self.recipe.name if quantization is None else quantization.algorithm.name

    @property
    def save_name(self) -> str:
        """The format's name."""
        where = self.compression.quantization or self.compression
        return where.save_name or "compressed-tensors"

    @property
    def low_memory(self) -> bool:
        """Whether AngelSlim's key asks for the tightest budget."""
        quantization = self.compression.quantization
        return quantization is not None and quantization.low_memory

    @property
    def ignore(self) -> tuple[str, ...]:
        """What stays in full precision, as the user wrote it."""
        return self.recipe.ignore

    def to_dict(self) -> dict[str, Any]:
        """Every option that is in force, in plain types; written as YAML, it reads as the same configuration."""
        values = (self.global_, self.model, self.compression, self.dataset, self.calibration)
        sections = zip(SECTIONS, values, strict=True)
        found = {key: _plain(asdict(section)) for key, section in sections if section is not None}
        recipe = self.compression.recipe
        found["compression"]["recipe"] = None if recipe is None else recipe.to_dict()
        found["compression"] = {key: value for key, value in found["compression"].items() if value is not None}
        return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, tuple) else value
