"""What quantization means, as data: `QuantizationArgs` for one tensor role, `QuantizationScheme` for a Linear.

Names and validity rules are those of compressed-tensors, so that a scheme can be written to config.json as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import ConfigError

Strategy = Literal["tensor", "channel", "group", "tensor_group", "block", "token", "attn_head"]
# compressed-tensors' other words for an `actorder`.
ACTORDER_ALIASES = {"static": "weight", "dynamic": "group"}
STRATEGIES: tuple[Strategy, ...] = ("tensor", "channel", "group", "tensor_group", "block", "token", "attn_head")
# The group sizes of MX (scales that are powers of two) and NVFP4 (e4m3 scales, and one for the tensor).
MX_GROUP, NVFP4_GROUP = 32, 16
# compressed-tensors' `scale_dtype` of each kind of scales, None where it says nothing.
SCALE_DTYPES = {"float": None, "e8m0": "torch.uint8", "nvfp4": "torch.float8_e4m3fn"}


@dataclass(frozen=True)
class QuantizationArgs:
    """How one tensor role (weights, input activations) is quantized. Source: compressed-tensors' QuantizationArgs.

    `dynamic` "local": the scales of groups are computed at run time, the one that they are divided by is static.
    `outlier_threshold`, of int8 activations per token: columns with a magnitude of as much stay in 16 bit (LLM.int8());
    compressed-tensors does not have it.
    """

    num_bits: int = 8
    type: Literal["int", "float"] = "int"
    symmetric: bool = True
    strategy: Strategy = "tensor"
    group_size: int | None = None
    block_structure: tuple[int, int] | None = None
    dynamic: bool | Literal["local"] = False
    actorder: Literal["group", "weight"] | None = None
    observer: str | None = None
    observer_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)
    outlier_threshold: float | None = None

    def __post_init__(self) -> None:
        def need(ok: bool, message: str) -> None:
            if not ok:
                raise ConfigError(message)

        orders = (None, "group", "weight")
        need(self.actorder in orders, f"actorder: '{self.actorder}' is not 'group', 'weight' or null")
        need(self.strategy in STRATEGIES, f"strategy: '{self.strategy}' is not one of {', '.join(STRATEGIES)}")
        need(self.type in ("int", "float"), f"type: '{self.type}' is not 'int' or 'float'")
        need(self.num_bits in (4, 8), f"num_bits: {self.num_bits} is not supported for type {self.type}; use (4, 8)")
        need(
            (self.strategy in ("group", "tensor_group")) == (self.group_size is not None),
            f"group_size: {self.group_size} does not go with strategy '{self.strategy}'; it belongs to 'group'",
        )
        fp4 = self.type == "float" and self.num_bits == 4
        sizes = {"group": MX_GROUP, "tensor_group": NVFP4_GROUP}
        need(
            not fp4 or sizes.get(self.strategy) == self.group_size,
            f"FP4 has strategy 'group' with group_size {MX_GROUP} (MXFP4) or 'tensor_group' with {NVFP4_GROUP} "
            f"(NVFP4), not '{self.strategy}' with {self.group_size}",
        )
        need(fp4 or self.strategy != "tensor_group", "strategy 'tensor_group' is for FP4 (type float, num_bits 4)")
        need(
            self.dynamic in (True, False) or (self.dynamic == "local" and self.strategy == "tensor_group"),
            f"dynamic: {self.dynamic!r} does not go with strategy '{self.strategy}'; use true or false",
        )
        need(self.group_size is None or self.group_size > 0, f"group_size: {self.group_size} must be positive")
        need(
            (self.strategy == "block") == (self.block_structure is not None),
            f"block_structure: {self.block_structure} does not go with strategy '{self.strategy}'",
        )
        need(self.strategy != "token" or self.dynamic is True, "strategy 'token' needs dynamic: true")
        need(self.type == "int" or self.symmetric, "type 'float' is always symmetric")
        per_token = (self.type, self.num_bits, self.strategy, self.symmetric) == ("int", 8, "token", True)
        need(
            self.outlier_threshold is None or (per_token and self.outlier_threshold > 0),
            f"outlier_threshold: {self.outlier_threshold} must be positive, and goes with symmetric int8 per token",
        )

    @property
    def block(self) -> tuple[int, int]:
        """The block shape that `quantkit.ops` take for this strategy; -1 is the whole extent."""
        if self.strategy in ("group", "tensor_group"):
            return (1, self.group_size or -1)
        if self.strategy == "block":
            return self.block_structure or (-1, -1)
        return (-1, -1) if self.strategy == "tensor" else (1, -1)

    @property
    def scales(self) -> Literal["float", "e8m0", "nvfp4"]:
        """What the scales are: any numbers, powers of two (MX), or e4m3 numbers over one for the tensor (NVFP4)."""
        if self.strategy == "tensor_group":
            return "nvfp4"
        return "e8m0" if self.type == "float" and self.group_size == MX_GROUP else "float"

    @property
    def fp4(self) -> bool:
        """Whether codes are FP4, two in a byte."""
        return self.type == "float" and self.num_bits == 4

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
        if inputs.strategy not in ("tensor", "token", "group", "tensor_group"):
            raise ConfigError(
                f"scheme {self.name}: activations cannot have strategy '{inputs.strategy}'; use tensor, token or group"
            )
        if inputs.strategy == "tensor_group" and (inputs.dynamic != "local" or weights.strategy != "tensor_group"):
            raise ConfigError(
                f"scheme {self.name}: NVFP4 activations have dynamic 'local' and go with NVFP4 weights, not with "
                f"dynamic {inputs.dynamic!r} and weights of strategy '{weights.strategy}'"
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
        return self.input_activations is not None and self.input_activations.dynamic is not True
