"""`quantization.name` and `quant_method` as a scheme: what each algorithm allows, and what it does by default."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..errors import ConfigError, nearest
from . import presets
from .fields import FieldError, require
from .recipe import AWQModifier, GPTQModifier, QuantizationModifier
from .schemes import QuantizationArgs, QuantizationScheme, Strategy

# quant_method's words for compressed-tensors' strategies.
STRATEGY_OF = {
    "per-tensor": "tensor",
    "per-channel": "channel",
    "per-group": "group",
    "per-block": "block",
    "per-token": "token",
}
GRANULARITY_OF = {strategy: granularity for granularity, strategy in STRATEGY_OF.items()} | {
    "tensor_group": "per-group"
}
GROUP_SIZE = 128
# quant_method.kv_cache; per-channel is read on NPUs only (save_name mindie).
KV_STRATEGY_OF: dict[str, Strategy] = {"per-tensor": "tensor", "per-head": "attn_head", "per-channel": "channel"}


@dataclass(frozen=True)
class QuantMethod:
    """`quant_method`: granularities and what goes with them. None: the algorithm's default, which is then filled in.

    `group_size` -1 is the default too, as AngelSlim writes it. `zero_point`: asymmetric weights. `block_size`: of
    per-block weights. `actorder` belongs to int4_gptq and `mse_range` to int4_awq. `kv_cache`: granularity of the KV
    cache's scales; None keeps it in 16 bit. `queries`: they are quantized as the cache is.
    """

    weight: str | None = None
    activation: str | None = None
    group_size: int | None = None
    zero_point: bool | None = None
    block_size: tuple[int, int] | None = None
    actorder: bool | None = None
    mse_range: bool | None = None
    kv_cache: str | None = None
    queries: bool = False

    def __post_init__(self) -> None:
        for key in ("weight", "activation"):
            value = getattr(self, key)
            if value is not None and value not in STRATEGY_OF:
                raise FieldError(
                    key, f"'{value}' is no granularity{nearest(value, STRATEGY_OF)}; {_one_of(STRATEGY_OF)}"
                )
        cache = self.kv_cache
        if cache is not None and cache not in KV_STRATEGY_OF:
            raise FieldError(
                "kv_cache",
                f"'{cache}': servers hold the cache with a scale per tensor or per head, NPUs also per channel; "
                f"{_one_of(KV_STRATEGY_OF)}",
            )
        require(
            not self.queries or cache in ("per-tensor", "per-head"),
            "queries",
            f"true, but kv_cache is {cache or 'null'}; they have the cache's granularity, per-tensor or per-head",
        )
        size = self.group_size
        require(
            size is None or size == -1 or (size > 0 and size % 8 == 0),
            "group_size",
            f"{size} must be a multiple of 8, or -1 for the default",
        )


@dataclass(frozen=True)
class Algorithm:
    """An entry of `quantization.name` or `quantization.scheme`.

    `weights`, `activations`: granularities that it takes, the default first; no activations: they stay in 16 bit.
    `zero_point`: the values it takes, the default first. `options`: further keys of quant_method. `modifier`: the class
    in recipe.py that does it.
    """

    scheme: QuantizationScheme
    weights: tuple[str, ...]
    activations: tuple[str, ...] = ()
    zero_point: tuple[bool, ...] = (False,)
    options: tuple[str, ...] = ()
    modifier: type[QuantizationModifier] = QuantizationModifier

    @property
    def name(self) -> str:
        return self.scheme.name

    def resolve(self, method: QuantMethod) -> tuple[QuantMethod, QuantizationScheme]:
        """`method` with every default filled in, and the scheme that it means. FieldError for what does not fit."""
        if self.scheme.weights.scales != "float":
            return self._as_it_is(method), self.scheme
        weight = self._pick("weight", method.weight, self.weights)
        activation = self._pick("activation", method.activation, self.activations)
        zero_point = self.zero_point[0] if method.zero_point is None else method.zero_point
        if zero_point not in self.zero_point:
            kind, advice = ("asymmetric", "symmetric") if self.zero_point[0] else ("symmetric", "asymmetric")
            options = [a.name for a in (*ALGORITHMS.values(), *PRESETS.values()) if a.is_weight_only(zero_point)]
            raise FieldError(
                "zero_point",
                f"{str(zero_point).lower()}, but the weights of {self.name} are {kind}; {advice} ones come with "
                f"{', '.join(options)}",
            )
        for key in ("actorder", "mse_range"):
            require(key in self.options or not getattr(method, key), key, f"{self.name} does not have it; leave it out")
        group_size = self._group_size(method.group_size, weight)
        block = self._block_size(method.block_size, weight)
        resolved = replace(
            method,
            weight=weight,
            activation=activation,
            group_size=group_size,
            zero_point=zero_point,
            block_size=block,
            actorder=self._default("actorder", method.actorder),
            mse_range=self._default("mse_range", method.mse_range),
        )
        weights = _weights(self.scheme.weights, str(weight), group_size, block, zero_point)
        inputs = self.scheme.input_activations
        if inputs is not None and activation != GRANULARITY_OF[inputs.strategy]:
            inputs = replace(inputs, strategy=STRATEGY_OF[str(activation)])  # type: ignore[arg-type]
        return resolved, QuantizationScheme(self.name, weights, inputs)

    def _as_it_is(self, method: QuantMethod) -> QuantMethod:
        """`method` for MX and NVFP4, whose groups are part of the format; AngelSlim calls them blocks."""
        size = self.scheme.weights.group_size
        for key in ("weight", "activation"):
            value = getattr(method, key)
            if self._pick(key, None if value == "per-block" else value, getattr(self, f"{key}s")) is None:
                require(value is None, key, f"'{value}', but {self.name} keeps activations in 16 bit; leave it out")
        require(method.group_size in (None, -1, size), "group_size", f"{method.group_size}: {self.name} has {size}")
        for key in ("zero_point", "block_size", "actorder", "mse_range"):
            fits = key in self.options or not getattr(method, key)
            require(fits, key, f"{self.name} does not have it; leave it out")
        activation = self.activations[0] if self.activations else None
        return replace(
            method,
            weight="per-group",
            activation=activation,
            group_size=size,
            zero_point=False,
            actorder=self._default("actorder", method.actorder),
        )

    def _default(self, option: str, value: bool | None) -> bool | None:
        """On, for an option that it has."""
        return True if option in self.options and value is None else value

    def is_weight_only(self, zero_point: bool) -> bool:
        """Whether it keeps activations in 16 bit, and can have such weights."""
        return not self.activations and zero_point in self.zero_point

    def _pick(self, key: str, value: str | None, allowed: tuple[str, ...]) -> str | None:
        if not allowed:
            require(
                value is None,
                key,
                f"'{value}', but {self.name} quantizes weights only and keeps activations in 16 bit; leave it out",
            )
            return None
        if value is None:
            return allowed[0]
        require(value in allowed, key, f"'{value}' does not go with {self.name}; {_one_of(allowed)}")
        return value

    def _group_size(self, size: int | None, weight: str | None) -> int | None:
        default = size is None or size == -1
        if weight != "per-group":
            require(
                default,
                "group_size",
                f"{size} goes with weight: per-group, and the weights of {self.name} are {weight} here"
                + ("; set quant_method.weight to per-group" if "per-group" in self.weights else "; leave it out"),
            )
            return None
        return (self.scheme.weights.group_size or GROUP_SIZE) if default else size

    def _block_size(self, block: tuple[int, int] | None, weight: str | None) -> tuple[int, int] | None:
        if weight != "per-block":
            require(
                block is None, "block_size", f"goes with weight: per-block, and that of {self.name} is {weight} here"
            )
            return None
        default = self.scheme.weights.block_structure
        require(block in (None, default), "block_size", f"{block} is read by no server; use {list(default or ())}")
        return default


def _weights(
    base: QuantizationArgs, weight: str, group_size: int | None, block: tuple[int, int] | None, zero_point: bool
) -> QuantizationArgs:
    return replace(
        base,
        strategy=STRATEGY_OF[weight],  # type: ignore[arg-type]
        group_size=group_size,
        block_structure=block,
        symmetric=not zero_point,
    )


def _one_of(names: Iterable[str]) -> str:
    listed = list(names)
    return f"it takes {listed[0]}" if len(listed) == 1 else f"use one of {', '.join(listed)}"


def _algorithm(
    name: str,
    weights: QuantizationArgs,
    inputs: QuantizationArgs | None,
    more_weights: tuple[str, ...] = (),
    more_activations: tuple[str, ...] = (),
    zero_point: tuple[bool, ...] | None = None,
    options: tuple[str, ...] = (),
    modifier: type[QuantizationModifier] = QuantizationModifier,
) -> Algorithm:
    activations = (GRANULARITY_OF[inputs.strategy], *more_activations) if inputs else ()
    return Algorithm(
        QuantizationScheme(name, weights, inputs),
        (GRANULARITY_OF[weights.strategy], *more_weights),
        activations,
        (not weights.symmetric,) if zero_point is None else zero_point,
        options,
        modifier,
    )


ALGORITHMS: dict[str, Algorithm] = {
    algorithm.name: algorithm
    for algorithm in (
        _algorithm("int8_dynamic", presets.int_weights(8), presets.INT8_TOKEN, ("per-tensor",)),
        _algorithm("int8_static", presets.int_weights(8), presets.INT8_STATIC, ("per-tensor",)),
        _algorithm("fp8_dynamic", presets.FP8_TENSOR_WEIGHTS, presets.FP8_TENSOR, ("per-channel",), ("per-token",)),
        _algorithm("fp8_static", presets.FP8_TENSOR_WEIGHTS, presets.FP8_STATIC, ("per-channel",)),
        _algorithm("fp8_blockwise", presets.FP8_BLOCK_WEIGHTS, presets.FP8_GROUP),
        _algorithm("int4", presets.int_weights(4, GROUP_SIZE), None, ("per-channel",), zero_point=(False, True)),
        # Eight bits need no groups: one scale per channel is as good, and fits whatever width a layer has.
        _algorithm("int8", presets.int_weights(8), None, ("per-group",), zero_point=(False, True)),
        _algorithm(
            "int4_gptq",
            presets.int_weights(4, GROUP_SIZE),
            None,
            ("per-channel",),
            zero_point=(False, True),
            options=("actorder",),
            modifier=GPTQModifier,
        ),
        _algorithm(
            "nvfp4_gptq",
            presets.PRESETS["NVFP4A16"].weights,
            None,
            options=("actorder",),
            modifier=GPTQModifier,
        ),
        _algorithm(
            "int4_awq",
            presets.int_weights(4, GROUP_SIZE, symmetric=False),
            None,
            zero_point=(True, False),
            options=("mse_range",),
            modifier=AWQModifier,
        ),
    )
}
ALIASES = {"int4_rtn": "int4", "int8_rtn": "int8", "nvfp4_weight_only": "nvfp4a16", "w4a8_fp8": "w4afp8"}
PRESETS: dict[str, Algorithm] = {
    name: _algorithm(name, scheme.weights, scheme.input_activations) for name, scheme in presets.PRESETS.items()
}

# AngelSlim has these; users who come with its files should read more than "unknown".
NOT_SUPPORTED = re.compile(r"fp8_lepto|daq|w4a8i8|\w+_gptaq")


def algorithm_of(name: str | None, scheme: str | None) -> Algorithm:
    """The entry for `quantization.name` or `quantization.scheme`, of which one is given. FieldError otherwise."""
    known = f"algorithms: {', '.join(ALGORITHMS)}; schemes: {', '.join(PRESETS)}"
    if scheme is not None:
        require(name is None, "scheme", f"'{scheme}' and name '{name}' say the same thing twice; leave one of them out")
        try:
            return PRESETS[presets.preset(scheme).name]
        except ConfigError as error:
            raise FieldError("scheme", str(error)) from None
    if name is None:
        raise FieldError("name", f"is required, or scheme instead of it; {known}")
    lower, upper = name.strip().lower(), name.strip().upper()
    lower = ALIASES.get(lower, lower)
    upper = lower.upper() if lower in ALIASES.values() else upper
    if lower in ALGORITHMS:
        # `INT8` and `FP8_DYNAMIC` are presets that differ from the algorithms of that name.
        if upper in PRESETS and name != lower:
            raise FieldError("name", f"'{name}' is ambiguous: write name: {lower}, or scheme: {upper}, which differ")
        return ALGORITHMS[lower]
    if upper in PRESETS:
        return PRESETS[upper]
    if NOT_SUPPORTED.fullmatch(lower) or presets.NOT_SUPPORTED.fullmatch(upper):
        raise FieldError("name", f"'{name}' is not supported by quantkit; {known}")
    guess = nearest(lower, ALGORITHMS) or nearest(upper, PRESETS)
    raise FieldError("name", f"no such algorithm: '{name}'{guess}; {known}")
