"""What a checkpoint is: `quantkit inspect FOLDER`, of any format that quantkit reads. Each kind of Linear with its
scheme, bits per weight and scales, and the rows that stand out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoint.reader import Checkpoint
from .plan import collapse
from .report.plan_view import describe, kinds_of
from .report.progress import Progress
from .report.table import size, table

if TYPE_CHECKING:
    from torch import Tensor

    from .formats.source import WeightSource

FP8_MAX, FP4_MAX = 448.0, 6.0
OUTLIER = 20.0  # a row whose scale is so many times the median of its Linear's stands out


@dataclass(frozen=True)
class LinearFacts:
    """One quantized Linear. `bits`: of all its tensors but the bias, per weight. `scale_min`, `scale_median` and
    `scale_max`: of the magnitudes of its scales; `negative`: how many are below zero. `at_ends`: share of the codes at
    an end of their range. `outlier_rows`: rows with a scale above OUTLIER times the median.
    """

    module: str
    scheme: str
    rows: int
    cols: int
    bits: float
    scale_min: float
    scale_median: float
    scale_max: float
    negative: int
    at_ends: float
    outlier_rows: tuple[int, ...] = ()


@dataclass
class Inspection:
    """What `inspect_folder` found. `kept`: Linears in full precision. `other_bytes`: of what is no quantized Linear."""

    folder: str
    model_type: str
    method: str
    schemes: dict[str, str]
    kv_cache: str
    total_bytes: int
    other_bytes: int
    linears: list[LinearFacts] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)

    @property
    def bits_per_weight(self) -> float:
        """Over all quantized Linears."""
        weights = sum(f.rows * f.cols for f in self.linears)
        return sum(f.bits * f.rows * f.cols for f in self.linears) / weights if weights else 0.0

    def to_json(self) -> str:
        """Everything, for programs."""
        return json.dumps({"bits_per_weight": self.bits_per_weight} | asdict(self), indent=2)

    def render(self) -> str:
        """A table with a row for each kind of Linear, and what stands out."""
        lines = [f"{self.folder}: {self.model_type}, {self.method}, {size(self.total_bytes)}"]
        lines += [f"scheme   {name}: {what}" for name, what in self.schemes.items()]
        lines += [f"KV cache {self.kv_cache}"] if self.kv_cache else []
        kinds: dict[tuple[str, str, int, int], list[LinearFacts]] = {}
        for f in self.linears:
            kinds.setdefault((collapse(f.module), f.scheme, f.rows, f.cols), []).append(f)
        rows = [
            [
                *(kind, len(of), scheme, f"{out} x {cols}", f"{_mean(f.bits for f in of):.2f}"),
                *(f"{min(f.scale_min for f in of):.2e}", f"{_mean(f.scale_median for f in of):.2e}"),
                *(f"{max(f.scale_max for f in of):.2e}", f"{100 * _mean(f.at_ends for f in of):.2f}"),
            ]
            for (kind, scheme, out, cols), of in kinds.items()
        ]
        if rows:
            head = ["quantized", "n", "scheme", "out x in", "bits", "scale min", "median", "max", "at ends %"]
            lines += ["", table(head, rows), ""]
            lines.append(f"{self.bits_per_weight:.2f} bits per quantized weight, scales included; ")
            lines[-1] += f"{size(self.other_bytes)} are not quantized"
        lines.append(f"in full precision: {kinds_of(self.kept) or 'nothing'}")
        for f in sorted(self.linears, key=lambda f: -f.scale_max / (f.scale_median or 1))[:8]:
            if f.outlier_rows:
                shown = ", ".join(map(str, f.outlier_rows[:6])) + (", ..." if len(f.outlier_rows) > 6 else "")
                times = f.scale_max / f.scale_median
                lines.append(f"outlier  {f.module}: scales up to {times:.0f} times the median, rows {shown}")
        negative = sum(f.negative for f in self.linears)
        lines += [f"note     {negative} scales are negative (GPTQ's signed scales)"] if negative else []
        return "\n".join(lines)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _range(scales: Tensor) -> str:
    return f"{float(scales.min()):.2e} to {float(scales.max()):.2e}"


def _cache(read: WeightSource, told: str) -> str:
    """The KV cache's scheme and the range of its scales."""
    import torch

    scales = [read.cache_scales(attention) for attention in read.cache_quantizers]
    if not scales:
        return f"{told}; no attention layer has scales"
    parts = []
    for what, values in zip(("keys", "values"), zip(*scales, strict=True), strict=True):
        every = torch.cat([scale.flatten() for scale in values])
        parts.append(f"{what} {_range(every)}")
    queries = ""
    if read.query_quantizers:
        every = torch.cat([read.query_scale(attention).flatten() for attention in read.query_quantizers])
        queries = f"; queries of {len(read.query_quantizers)} are rounded, too, scales of {_range(every)}"
    return f"{told}; {len(scales)} attention layers, scales of {' and '.join(parts)}{queries}"


def inspect_folder(folder: str | Path, *, progress: bool = True) -> Inspection:
    """Read every quantized Linear of the checkpoint in `folder`. A plain checkpoint has none, which is told.
    CheckpointError for a damaged one.
    """
    from .formats.source import WeightSource
    from .formats.stacked_source import split
    from .formats.stored import check_stored
    from .models.families import family_of

    with split(Checkpoint(folder)) as checkpoint:
        read = WeightSource(checkpoint)
        check_stored(read)
        family = family_of(checkpoint.config)
        stored = {name for module in read.modules for name in read.stored(module)}
        other = sum(info.nbytes for name, info in checkpoint.tensors.items() if name not in stored)
        schemes: dict[str, str] = {}
        for scheme in dict.fromkeys(read.schemes.values()):
            inputs = scheme.input_activations
            told = f"weights {describe(scheme.weights)}; activations {describe(inputs) if inputs else 'not quantized'}"
            schemes[_label(scheme.name, schemes)] = told
        names = dict(zip(dict.fromkeys(read.schemes.values()), schemes, strict=True))
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
        found = Inspection(
            str(folder),
            family.model_type,
            "not quantized" if read.format is None else read.format.NAME,
            schemes,
            "" if read.kv_cache is None else _cache(read, describe(read.kv_cache)),
            checkpoint.total_bytes,
            other,
            kept=[w.module for w in family.linear_weights(shapes) if w.module not in read.modules],
        )
        with Progress("inspect", total=len(read.modules), unit="Linear", enabled=progress) as bar:
            for module in read.schemes:
                found.linears.append(_facts(module, names[read.schemes[module]], read))
                read.release(f"{module}.weight")
                bar.advance(1)
    return found


def _label(name: str, taken: dict[str, str]) -> str:
    """`name`, numbered where two schemes have it."""
    return name if name not in taken else f"{name} ({sum(key.split(' (')[0] == name for key in taken) + 1})"


def _facts(module: str, scheme: str, read: WeightSource) -> LinearFacts:
    import torch

    weight = read.sound(module)
    nbytes = sum(read.checkpoint.tensors[name].nbytes for name in read.stored(module))
    scale, codes = weight.scale.abs(), weight.unpacked()
    if weight.args.fp4:
        ends = codes.float().abs() == FP4_MAX
    elif weight.args.type == "float":
        ends = codes.float().abs() == FP8_MAX
    else:
        q_min, q_max = weight.args.q_range
        ends = (codes == q_min) | (codes == q_max)
    by_row = scale.amax(1)
    median = float(scale.median())
    rows = (by_row > OUTLIER * median).nonzero().flatten().tolist() if len(by_row) == weight.rows else []
    return LinearFacts(
        module,
        scheme,
        weight.rows,
        weight.cols,
        8 * nbytes / max(1, weight.rows * weight.cols),
        float(scale.min()),
        median,
        float(scale.max()),
        int((weight.scale < 0).sum()),
        float(torch.count_nonzero(ends)) / max(1, codes.numel()),
        tuple(rows),
    )
