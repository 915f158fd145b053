"""Recipes: what is done to a model, as a list of modifiers in llm-compressor's names and arguments.

A modifier here only says what it wants; `quantkit.modifiers` does it. Transforms (SmoothQuant, AWQ) change weights so
that the model computes the same and quantizes better; quantizers (RTN, GPTQ) turn weights into codes, in that order.
"""

from __future__ import annotations

from collections.abc import Mapping as MappingType
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Literal

from ..errors import nearest
from .arguments import Checked
from .attention import AttentionGroup, attention_of, cache_args, check_observer, for_attention
from .fields import FieldError, require
from .groups import SchemeGroup, config_group, group_entry, kv_cache_args, names, with_actorder
from .observers import INPUT_OBSERVERS, WEIGHT_OBSERVERS, observer
from .presets import preset
from .schemes import QuantizationArgs, QuantizationScheme

LOW_DATA = ("rtn", "all_tokens", "error")


@dataclass(frozen=True)
class Mapping:
    """One place for smoothing: the output of `smooth_layer` is divided by s per channel, the inputs of
    `balance_layers` are multiplied by it. Each is a full name, its last dotted parts, or `re:` and a pattern.
    """

    smooth_layer: str
    balance_layers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Modifier(metaclass=Checked):
    """Base of all modifiers. `idle`: the arguments it was given that have no effect."""

    kind: ClassVar[str]
    transforms: ClassVar[bool] = False
    idle: ClassVar[tuple[str, ...]] = ()

    @property
    def groups(self) -> tuple[SchemeGroup, ...]:
        """The schemes that this modifier gives to Linears; empty for a pure transform."""
        return ()


@dataclass(frozen=True, kw_only=True)
class QuantizationModifier(Modifier):
    """Round to nearest, with static activation and KV-cache scales from calibration data where the scheme has them.

    `scheme`: a preset's name, a QuantizationScheme, or {preset: [targets]}; `config_groups` spells groups out as
    compressed-tensors does, instead of it; one without weights is for attention, see `config.attention`.
    `kv_cache_scheme`: QuantizationArgs or a mapping of its fields, or "fp8" / "int8". Observers say how scales are
    found: weights minmax, mse or percentile; inputs minmax, moving_average, percentile, mse, kl, eq or admm.
    `moe_calibrate_all_experts`: experts see all tokens in calibration, not only those routed to them.
    """

    kind: ClassVar[str] = "rtn"

    targets: str | Sequence[str] = ("Linear",)
    ignore: str | Sequence[str] = ()
    scheme: str | QuantizationScheme | MappingType[str, Any] | None = None
    config_groups: MappingType[str, Any] | None = None
    kv_cache_scheme: str | QuantizationArgs | MappingType[str, Any] | None = None
    weight_observer: str | None = None
    input_observer: str | None = None
    observer: str | MappingType[str, str] | None = None
    moe_calibrate_all_experts: bool = False

    def __post_init__(self) -> None:
        for key in ("targets", "ignore"):
            object.__setattr__(self, key, names(key, getattr(self, key)))
        require(bool(self.targets), "targets", "is empty; use Linear, names, or re: and a pattern")
        require(self.scheme is None or self.config_groups is None, "scheme", "and config_groups both given; use one")
        object.__setattr__(self, "_attention", attention_of(self.config_groups))
        object.__setattr__(self, "_groups", self._ordered(self._with_observers(self._resolve())))
        self._spell_groups()
        object.__setattr__(self, "_kv_cache", cache_args(kv_cache_args(self.kv_cache_scheme), self.attention))
        self._require_something()

    def _spell_groups(self) -> None:
        """`config_groups` in one way, so that equal recipes are equal."""
        if self.config_groups is not None:
            object.__setattr__(self, "config_groups", self.entries())

    def entries(self) -> dict[str, Any]:
        """All groups as `config_groups` has them, by names of their own."""
        schemes = [g.scheme.name for g in self.groups]
        keys = schemes if len(set(schemes)) == len(schemes) else [f"group_{i}" for i in range(len(schemes))]
        attention = {} if self.attention is None else {self.attention.name: self.attention.entry}
        return dict(zip(keys, map(group_entry, self.groups), strict=True)) | attention

    def _require_something(self) -> None:
        require(
            bool(self.groups) or self.kv_cache is not None,
            "scheme",
            f"is missing, and there are no config_groups: {type(self).__name__} would do nothing; "
            'give scheme="W8A8" or another preset',
        )

    @property
    def groups(self) -> tuple[SchemeGroup, ...]:
        found: tuple[SchemeGroup, ...] = self._groups  # type: ignore[attr-defined]
        return found

    @property
    def attention(self) -> AttentionGroup | None:
        """How queries are quantized, and keys and values with them; None: queries stay in 16 bit."""
        found: AttentionGroup | None = self._attention  # type: ignore[attr-defined]
        return found

    @property
    def kv_cache(self) -> QuantizationArgs | None:
        """How keys and values are held in the cache; None: in 16 bit."""
        args: QuantizationArgs | None = self._kv_cache  # type: ignore[attr-defined]
        return args

    def _resolve(self) -> tuple[SchemeGroup, ...]:
        targets = tuple(self.targets)
        if self.config_groups is not None:
            return tuple(config_group(k, group) for k, group in self.config_groups.items() if not for_attention(group))
        if self.scheme is None:
            return ()
        if isinstance(self.scheme, QuantizationScheme):
            return (SchemeGroup(targets, self.scheme),)
        if isinstance(self.scheme, str):
            return (SchemeGroup(targets, preset(self.scheme)),)
        require(bool(self.scheme), "scheme", "is an empty mapping; write {preset: [targets]}")
        return tuple(SchemeGroup(names(f"scheme.{k}", v), preset(k)) for k, v in self.scheme.items())

    def _with_observers(self, groups: tuple[SchemeGroup, ...]) -> tuple[SchemeGroup, ...]:
        chosen = {"weights": self.weight_observer, "input": self.input_observer}
        if isinstance(self.observer, str):
            chosen = {k: v or self.observer for k, v in chosen.items()}
        elif self.observer is not None:
            for key, name in self.observer.items():
                require(key in chosen, f"observer.{key}", f"unknown{nearest(key, chosen)}; use weights and input")
                chosen[key] = chosen[key] or name
        weights = observer("weight_observer", chosen["weights"], WEIGHT_OBSERVERS)
        inputs = observer("input_observer", chosen["input"], INPUT_OBSERVERS)
        if self.attention is not None:
            check_observer("input_observer", inputs)
        result = []
        for group in groups:
            scheme = group.scheme
            if weights is not None:
                scheme = replace(scheme, weights=replace(scheme.weights, observer=weights))
            activations = scheme.input_activations
            if inputs is not None and activations is not None and not activations.dynamic:
                scheme = replace(scheme, input_activations=replace(activations, observer=inputs))
            result.append(replace(group, scheme=scheme))
        return tuple(result)

    def _ordered(self, groups: tuple[SchemeGroup, ...]) -> tuple[SchemeGroup, ...]:
        """`groups` without an `actorder`, which only GPTQ has."""
        for group in groups:
            require(
                group.scheme.weights.actorder != "group",
                "config_groups",
                f"{group.scheme.name}: actorder 'group' belongs to GPTQModifier; leave it out",
            )
        return tuple(with_actorder(group, None) for group in groups)


@dataclass(frozen=True, kw_only=True)
class GPTQModifier(QuantizationModifier):
    """GPTQ (Frantar et al., 2022): columns are rounded one by one, each error taken off the columns still to come.

    `actorder`: "weight" (alias "static") takes columns with the largest inputs first and leaves groups where they
    are; "group" makes groups of columns in that order too (written as g_idx, read by few servers); None takes them
    as they come. FP8, MX and NVFP4 weights keep the scales of rounding to nearest. `min_tokens_per_module`: an
    expert that saw fewer tokens gets what `low_data` says: "rtn", "all_tokens" (the statistics of all its layer's
    experts), or "error". `signed_scales`: 4-bit symmetric groups and rows may get a negative scale, so that the
    larger of their tails reaches the code -8, which no positive one lets the upper tail do; only where activations
    are not quantized. False keeps all scales positive, for readers that insist on it.
    """

    kind: ClassVar[str] = "gptq"

    block_size: int = 128
    dampening_frac: float = 0.01
    actorder: Literal["weight", "static", "group"] | None = "static"
    offload_hessians: bool = False
    min_tokens_per_module: int = 32
    low_data: Literal["rtn", "all_tokens", "error"] = "all_tokens"
    signed_scales: bool = True

    def _ordered(self, groups: tuple[SchemeGroup, ...]) -> tuple[SchemeGroup, ...]:
        """Groups of columns in their order, written in a scheme, are taken as the modifier's own `actorder`."""
        found = {group.scheme.weights.actorder == "group" for group in groups}
        require(
            len(found) < 2, "config_groups", "actorder 'group' in some groups only; use it in all, or two modifiers"
        )
        if True in found and self.actorder in ("static", "group"):
            object.__setattr__(self, "actorder", "group")
        return groups

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.block_size > 0, "block_size", f"{self.block_size} must be positive")
        frac = self.dampening_frac
        require(0 <= frac <= 1, "dampening_frac", f"{frac} is a share of the mean diagonal, between 0 and 1")
        orders = (None, "weight", "static", "group")
        require(
            self.actorder in orders,
            "actorder",
            f"'{self.actorder}'{nearest(str(self.actorder), ['weight', 'group'])}; use weight, group or null",
        )
        if self.actorder == "static":
            object.__setattr__(self, "actorder", "weight")
        _check_low_data(self)
        order: Literal["group"] | None = "group" if self.actorder == "group" else None
        object.__setattr__(self, "_groups", tuple(with_actorder(group, order) for group in self.groups))
        self._spell_groups()
        for group in self.groups:
            weights = group.scheme.weights
            require(
                weights.type == "float" or weights.strategy in ("channel", "group", "tensor"),
                "scheme",
                f"{group.scheme.name}: GPTQ rounds to integers per channel or group; use QuantizationModifier for "
                f"{weights.type} weights per {weights.strategy}",
            )
            if self.actorder == "group":
                require(
                    weights.strategy == "group" and weights.type == "int" and group.scheme.input_activations is None,
                    "actorder",
                    f"'group' needs weight-only groups of integers, not {group.scheme.name}; use 'weight'",
                )


@dataclass(frozen=True, kw_only=True)
class SmoothQuantModifier(Modifier):
    """SmoothQuant (Xiao et al., 2022): s = max|x|^strength / max|w|^(1 - strength) per channel moves outliers from
    activations into weights. `mappings`: [[balance layers], smooth layer] pairs; the model family's unless given.
    """

    kind: ClassVar[str] = "smoothquant"
    transforms: ClassVar[bool] = True

    smoothing_strength: float = 0.5
    mappings: Sequence[Any] | None = None
    ignore: str | Sequence[str] | None = ()
    algorithm: Literal["smoothquant", "log_equalization"] = "smoothquant"

    def __post_init__(self) -> None:
        strength = self.smoothing_strength
        require(0 <= strength <= 1, "smoothing_strength", f"{strength} is not between 0 and 1")
        require(
            self.algorithm in ("smoothquant", "log_equalization"),
            "algorithm",
            f"'{self.algorithm}'; use smoothquant or log_equalization",
        )
        object.__setattr__(self, "ignore", names("ignore", self.ignore or ()))
        object.__setattr__(self, "mappings", _mappings(self.mappings))


@dataclass(frozen=True, kw_only=True)
class AWQModifier(QuantizationModifier):
    """AWQ (Lin et al., 2023): the smoothing vector is searched so that the quantized layer's output changes least.

    Without a scheme of its own it is a transform for the quantizer that follows; with one it also rounds to nearest.
    `duo_scaling`: candidates look at weights too (True), do not (False), or both kinds are tried ("both"). `clip`:
    where 4-bit weights are then rounded to nearest, each group's range is searched, columns weighed by their inputs.
    `loss`: "gram" from the Gram matrix, "parent" by running the layer.
    """

    kind: ClassVar[str] = "awq"
    transforms: ClassVar[bool] = True

    mappings: Sequence[Any] | None = None
    duo_scaling: bool | Literal["both"] = True
    n_grid: int = 20
    clip: bool = True
    loss: Literal["gram", "parent"] = "gram"
    offload_device: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.n_grid >= 2, "n_grid", f"{self.n_grid} must be at least 2")
        require(
            self.duo_scaling in (True, False, "both"), "duo_scaling", f"{self.duo_scaling!r}; use true, false, both"
        )
        require(self.loss in ("gram", "parent"), "loss", f"'{self.loss}'; use gram or parent")
        object.__setattr__(self, "mappings", _mappings(self.mappings))

    def _require_something(self) -> None:
        return  # a pure transform is something


MODIFIERS: dict[str, type[Modifier]] = {
    cls.__name__: cls for cls in (QuantizationModifier, SmoothQuantModifier, GPTQModifier, AWQModifier)
}
ALIASES = {"SmoothQuant": "SmoothQuantModifier", "GPTQ": "GPTQModifier", "AWQ": "AWQModifier"}


@dataclass(frozen=True)
class Recipe:
    """Modifiers in the order in which they work on each layer; see `check` for what goes together."""

    modifiers: tuple[Modifier, ...]

    def __post_init__(self) -> None:
        require(bool(self.modifiers), "recipe", "is empty; give at least one modifier")
        seen_quantizer: str | None = None
        for modifier in self.modifiers:
            name = type(modifier).__name__
            if modifier.transforms and seen_quantizer is not None:
                raise FieldError(
                    "recipe", f"{name} stands after {seen_quantizer}, which has quantized already; put it before"
                )
            if modifier.groups:
                seen_quantizer = name
        require(
            bool(self.groups) or self.kv_cache is not None,
            "recipe",
            "has no modifier that quantizes; add QuantizationModifier or GPTQModifier with a scheme",
        )
        caches = [m for m in self.quantizers if m.kv_cache is not None]
        told = "gives kv_cache_scheme twice, as a group for attention does, too; keep one"
        require(len(caches) < 2, "recipe", told)

    @property
    def quantizers(self) -> tuple[QuantizationModifier, ...]:
        """The modifiers that give schemes to Linears or to the KV cache."""
        return tuple(
            m for m in self.modifiers if isinstance(m, QuantizationModifier) and (m.groups or m.kv_cache is not None)
        )

    @property
    def groups(self) -> tuple[SchemeGroup, ...]:
        return tuple(group for m in self.modifiers for group in m.groups)

    @property
    def ignore(self) -> tuple[str, ...]:
        """What quantizers leave out, each pattern once."""
        return tuple(dict.fromkeys(pattern for m in self.quantizers for pattern in m.ignore))

    @property
    def kv_cache(self) -> QuantizationArgs | None:
        return next((m.kv_cache for m in self.quantizers if m.kv_cache is not None), None)

    @property
    def attention(self) -> AttentionGroup | None:
        return next((m.attention for m in self.quantizers if m.attention is not None), None)

    @property
    def idle(self) -> tuple[str, ...]:
        """Arguments that were given and have no effect, as `GPTQModifier.block_size`."""
        return tuple(dict.fromkeys(f"{type(m).__name__}.{name}" for m in self.modifiers for name in m.idle))

    @property
    def needs_data(self) -> bool:
        """Whether anything in it looks at activations."""
        return (
            any(m.transforms or m.kind == "gptq" for m in self.modifiers)
            or any(group.scheme.needs_calibration for group in self.groups)
            or self.kv_cache is not None
        )

    @property
    def all_experts(self) -> bool:
        """Whether every expert is calibrated with all tokens, not with those routed to it."""
        return any(m.moe_calibrate_all_experts for m in self.quantizers)

    @property
    def name(self) -> str:
        """`SmoothQuant + GPTQ W8A8`."""
        titles = {"smoothquant": "SmoothQuant", "awq": "AWQ", "gptq": "GPTQ", "rtn": ""}
        schemes = list(dict.fromkeys(group.scheme.name for group in self.groups))
        if self.kv_cache is not None:
            what = "KV" if self.attention is None else "attention"
            schemes.append(f"{what} {'FP8' if self.kv_cache.type == 'float' else 'INT8'}")
        methods = list(dict.fromkeys(titles[m.kind] for m in self.modifiers if titles[m.kind]))
        return " ".join(part for part in (" + ".join(methods), " / ".join(schemes)) if part)

    def to_dict(self) -> dict[str, Any]:
        """Plain types that `recipe_of` reads back as the same recipe."""
        entries = [{type(m).__name__: _arguments(m)} for m in self.modifiers]
        names = {name for entry in entries for name in entry}
        if len(names) < len(entries):  # a mapping could hold only one modifier of a kind
            return {"quant_stage": {"quant_modifiers": entries}}
        return {"quant_stage": {"quant_modifiers": {name: entry[name] for entry in entries for name in entry}}}


def _mappings(value: Sequence[Any] | None) -> tuple[Mapping, ...] | None:
    """Mappings as given by users: Mapping, [[balance...], smooth], or {smooth_layer, balance_layers}."""
    if value is None:
        return None
    result = []
    for i, entry in enumerate(value):
        key = f"mappings[{i}]"
        smooth: Any = getattr(entry, "smooth_layer", None)
        balance: Any = getattr(entry, "balance_layers", None)
        if isinstance(entry, MappingType):
            smooth, balance = entry.get("smooth_layer"), entry.get("balance_layers")
        elif isinstance(entry, Sequence) and not isinstance(entry, str) and len(entry) == 2:
            balance, smooth = entry
        require(
            isinstance(smooth, str) and bool(balance),
            key,
            f"{entry!r}; write [[balance layers], smooth layer] or {{smooth_layer: ..., balance_layers: [...]}}",
        )
        result.append(Mapping(smooth, names(key, balance)))
    require(bool(result), "mappings", "is an empty list; leave it out for the model family's own")
    return tuple(result)


def _check_low_data(modifier: GPTQModifier) -> None:
    low = modifier.low_data
    require(low in LOW_DATA, "low_data", f"'{low}'{nearest(low, LOW_DATA)}; use one of {', '.join(LOW_DATA)}")
    count = modifier.min_tokens_per_module
    require(count >= 0, "min_tokens_per_module", f"{count} is negative")


def _arguments(modifier: Modifier) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, QuantizationScheme | QuantizationArgs | Mapping | SchemeGroup):
            return {k: plain(v) for k, v in asdict(value).items() if v is not None}
        if isinstance(value, MappingType):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, tuple | list) else value

    found = {}
    for f in fields(modifier):
        value = getattr(modifier, f.name)
        if value != f.default:
            found[f.name] = plain(value)
    if isinstance(modifier, QuantizationModifier) and (
        isinstance(modifier.scheme, QuantizationScheme) or modifier.config_groups is not None
    ):
        found.pop("scheme", None)
        found["config_groups"] = modifier.entries()
        found.pop("targets", None)
    return found
