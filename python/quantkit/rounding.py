"""Weights rounded to nearest from file to file, and compared with what came of it, without torch: by `_host`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from .checkpoint.native import host
from .config.schemes import QuantizationArgs
from .errors import CheckpointError

if TYPE_CHECKING:
    from ._host import MappedFile, OutputFile, Rounding, Scales, Weight
    from .formats.rows import RowTensors

# Bytes of a weight that go through memory at a time. Parts of 8 MB leave the cache before they are written, and a run
# of 1.4 GB takes three times as long.
PART = 2 << 20
FP8_MAX = 448.0  # of e4m3


def round_weight(
    weight: Weight,
    args: QuantizationArgs,
    rows: RowTensors,
    places: Mapping[str, tuple[OutputFile, int]],
    *,
    scale_dtype: str,
    packed: bool,
) -> list[int] | None:
    """Write what `weight` becomes to the `places` of the tensors `rows`. Scales are rounded to `scale_dtype`, a
    safetensors name, before codes are made, which are bytes, or `packed` into words. None, or, if there is NaN or Inf,
    the first rows with it; then not all is written.
    """
    how, zeros = _rounding(args, scale_dtype, packed), places[rows.zero_point] if rows.zero_point else None
    bad: list[int] | None = host().round_weight(weight, how, PART, places[rows.codes], places[rows.scale], zeros)
    for name, content in rows.constants.items() if bad is None else ():
        file, begin = places[name]
        file.write(content, begin)
    return bad


def compare(
    weight: Weight,
    args: QuantizationArgs,
    codes: tuple[MappedFile, int],
    scales: Scales,
    zero_point: tuple[MappedFile, int] | None,
    *,
    packed: bool,
) -> tuple[float, float, float, float]:
    """Of a weight x and what its codes mean, x^: sum of (x - x^)^2, sum of x^2, largest |x - x^|, largest |x|."""
    found: tuple[float, float, float, float] = host().compare_weight(
        weight, _rounding(args, "F32", packed), PART, codes, scales, zero_point
    )
    return found


def grid(args: QuantizationArgs, rows: int, cols: int) -> tuple[int, int]:
    """How many blocks cover a weight."""
    block_rows, block_cols = args.block
    return (
        1 if block_rows == -1 else -(-rows // block_rows),
        1 if block_cols == -1 else -(-cols // block_cols),
    )


def _rounding(args: QuantizationArgs, scale_dtype: str, packed: bool) -> Rounding:
    made: Rounding = host().Rounding(
        type=args.type,
        packed=packed,
        bits=args.num_bits,
        symmetric=args.symmetric,
        range=args.q_range,
        divisor=FP8_MAX if args.type == "float" else args.divisor,
        scale_dtype=scale_dtype,
        block=args.block,
    )
    return made


def not_finite(name: str, bad: Iterable[int], rows: int) -> CheckpointError:
    """The error for a weight of so many `rows` that has NaN or Inf in rows `bad`."""
    bad = list(bad)
    shown = ", ".join(map(str, bad[:5])) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
    return CheckpointError(
        f"{name}: NaN or Inf in row{'s' if len(bad) > 1 else ''} {shown} of {rows}; "
        f"the source checkpoint is damaged, or leave this layer out with ignore_layers"
    )
