"""What a weight that is rounded to nearest becomes in formats that hold its rows as rows, some rows at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..config.schemes import QuantizationScheme

if TYPE_CHECKING:
    from . import Format

# Observers that look for scales, which takes torch's ops; all others take a weight's own range.
SEARCHED = ("mse", "percentile")


@dataclass(frozen=True)
class RowTensors:
    """Full names of tensors: `codes`, bytes or words [rows, ...]; `scale`, row-major as the grid of blocks;
    `zero_point`, packed along the rows, None if symmetric. `constants`: the bytes of those that depend on nothing but
    the weight's shape.
    """

    codes: str
    scale: str
    zero_point: str | None = None
    constants: Mapping[str, bytes] = field(default_factory=dict)


def no_rows(module: str, scheme: QuantizationScheme, rows: int, cols: int) -> RowTensors | None:
    """Of a format that holds them otherwise."""
    return None


def by_rows(fmt: Format, module: str, scheme: QuantizationScheme, rows: int, cols: int) -> RowTensors | None:
    """What `fmt` makes of a weight that is rounded to nearest without a whole one in memory; None for one that is."""
    return None if scheme.weights.observer in SEARCHED else fmt.row_tensors(module, scheme, rows, cols)
