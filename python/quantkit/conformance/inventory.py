"""What a folder holds, as the rules ask for it: each Linear with the tensors it is stored as, from headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..checkpoint.header import TensorInfo
from ..checkpoint.reader import Checkpoint
from ..models.families import Family, family_of
from ..plan import ROW_PARALLEL

# What any of the formats stores of a Linear beside, or instead of, its weight.
CODES = ("weight_packed", "qweight")
SCALES = ("weight_scale", "weight_scale_inv", "scales", "deq_scale", "SCB")
OTHERS = (
    "weight_shape",
    "weight_zero_point",
    "weight_g_idx",
    "weight_global_scale",
    "input_scale",
    "input_zero_point",
    "input_global_scale",
    "qzeros",
    "g_idx",
    "weight_offset",
    "weight_format",
    "input_offset",
    "quant_bias",
    "deq_scale",
)
SUFFIXES = frozenset(("weight", "bias", *CODES, *SCALES, *OTHERS))
FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Stored:
    """A Linear by its full name: `parts` are its tensors by their last name; `quantized` if more than a weight."""

    name: str
    parts: Mapping[str, TensorInfo]
    head: bool = False

    @cached_property
    def quantized(self) -> bool:
        return any(part in self.parts for part in (*CODES, *SCALES))

    @property
    def expert(self) -> bool:
        return ".experts." in self.name

    @property
    def row_parallel(self) -> bool:
        """Whether servers split its input over ranks, not its output."""
        return ROW_PARALLEL.search(self.name) is not None


class Inventory:
    """`linears` in the order of the files; `block` is config.json's quantization_config, None without one."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.config: Mapping[str, Any] = checkpoint.config
        self.family: Family = family_of(checkpoint.config)
        found = checkpoint.config.get("quantization_config")
        self.block: Mapping[str, Any] | None = found if isinstance(found, Mapping) else None
        parts: dict[str, dict[str, TensorInfo]] = {}
        for name, info in checkpoint.tensors.items():
            module, _, part = name.rpartition(".")
            if part in SUFFIXES:
                parts.setdefault(module, {})[part] = info
        self.linears: dict[str, Stored] = {}
        for module, found_parts in parts.items():
            stored = Stored(module, found_parts, self.family.is_head(module))
            weight = found_parts.get("weight")
            plain = weight is not None and self.family.is_linear(f"{module}.weight", weight.shape)
            if stored.quantized or plain:
                self.linears[module] = stored

    @property
    def quantized(self) -> list[Stored]:
        return [stored for stored in self.linears.values() if stored.quantized]

    def fused_sets(self) -> list[tuple[Stored, ...]]:
        """Linears that read one input and that servers make one of: q, k and v; gate and up."""
        return [tuple(self.linears[name] for name in names) for names in self.family.fused_sets(self.linears)]

    def value(self, stored: Stored, part: str) -> bytes | None:
        """The bytes of one (small) tensor of a Linear, None if it has none."""
        info = stored.parts.get(part)
        if info is None:
            return None
        mapped = self.checkpoint.mapped(info.file)
        mapped.populate(info.begin, info.end)
        return bytes(memoryview(mapped)[info.begin : info.end])
