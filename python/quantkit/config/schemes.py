"""What quantization means, as data: `QuantizationArgs` for one tensor role, `QuantizationScheme` for a Linear.

Names and validity rules are those of compressed-tensors, so that a scheme can be written to config.json as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import ConfigError

Strategy = Literal["tensor", "channel", "group", "block", "token", "attn_head"]
# compressed-tensors' other words for an `actorder`.
ACTORDER_ALIASES = {"static": "weight", "dynamic": "group"}
STRATEGIES: tuple[Strategy, ...] = ("tensor", "channel", "group", "block", "token", "attn_head")


@dataclass(frozen=True)
class QuantizationArgs:
    """How one tensor role (weights, input activations) is quantized. Source: compressed-tensors' QuantizationArgs."""

    num_bits: int = 8
    type: Literal["int", "float"] = "int"
    symmetric: bool = True
    strategy: Strategy = "tensor"
    group_size: int | None = None
    block_structure: tuple[int, int] | None = None
    dynamic: bool = False
    actorder: Literal["group", "weight"] | None = None
    observer: str | None = None
    observer_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        def need(ok: bool, message: str) -> None:
            if not ok:
                raise ConfigError(message)

        orders = (None, "group", "weight")
        need(self.actorder in orders, f"actorder: '{self.actorder}' is not 'group', 'weight' or null")
        need(self.strategy in STRATEGIES, f"strategy: '{self.strategy}' is not one of {', '.join(STRATEGIES)}")
        need(self.type in ("int", "float"), f"type: '{self.type}' is not 'int' or 'float'")
        bits = (4, 8) if self.type == "int" else (8,)
        need(self.num_bits in bits, f"num_bits: {self.num_bits} is not supported for type {self.type}; use {bits}")
        need(
            (self.strategy == "group") == (self.group_size is not None),
            f"group_size: {self.group_size} does not go with strategy '{self.strategy}'; it belongs to 'group'",
        )
        need(self.group_size is None or self.group_size > 0, f"group_size: {self.group_size} must be positive")
        need(
            (self.strategy == "block") == (self.block_structure is not None),
            f"block_structure: {self.block_structure} does not go with strategy '{self.strategy}'",
        )
        need(self.strategy != "token" or self.dynamic, "strategy 'token' needs dynamic: true")
        need(self.type == "int" or self.symmetric, "type 'float' is always symmetric")

    @property
    def block(self) -> tuple[int, int]:
        """The block shape that `quantkit.ops` take for this strategy; -1 is the whole extent."""
        if self.strategy == "group":
            return (1, self.group_size or -1)
        if self.strategy == "block":
            return self.block_structure or (-1, -1)
        return (-1, -1) if self.strategy == "tensor" else (1, -1)

    @property
    def q_range(self) -> tuple[int, int]:
        """Smallest and largest integer code. Symmetric int8 leaves out -128, which some kernels cannot negate."""
        half = 1 << (self.num_bits - 1)
        return (-127, 127) if self.symmetric and self.num_bits == 8 else (-half, half - 1)

    @property
    def divisor(self) -> float:
        """The code that the largest magnitude becomes; int4 splits the difference between -8 and 7."""
        return 7.5 if self.num_bits == 4 else 127.0


@dataclass(frozen=True)
class QuantizationScheme:
    """What happens to a Linear: its weights, and the activations that enter it (None: kept in 16 bit)."""

    name: str
    weights: QuantizationArgs
    input_activations: QuantizationArgs | None = None

    def __post_init__(self) -> None:
        weights, inputs = self.weights, self.input_activations
        if weights.dynamic:
            raise ConfigError(f"scheme {self.name}: weights cannot be dynamic; they are quantized once")
        if inputs is None:
            return
        if inputs.strategy not in ("tensor", "token", "group"):
            raise ConfigError(
                f"scheme {self.name}: activations cannot have strategy '{inputs.strategy}'; use tensor, token or group"
            )
        if not inputs.dynamic and inputs.strategy != "tensor":
            raise ConfigError(
                f"scheme {self.name}: static activations have one scale per tensor, not per {inputs.strategy}; "
                "use strategy tensor, or dynamic: true"
            )

    @property
    def scales_may_be_negative(self) -> bool:
        """Whether a search may negate a weight's scales: only where nothing but a multiplication reads them."""
        weights, alone = self.weights, self.input_activations is None
        integers = weights.type == "int" and weights.num_bits == 4 and weights.symmetric
        return alone and integers and weights.strategy in ("group", "channel")

    @property
    def needs_calibration(self) -> bool:
        """Whether activation scales are fixed from data (static) and not computed at run time (dynamic)."""
        return self.input_activations is not None and not self.input_activations.dynamic
