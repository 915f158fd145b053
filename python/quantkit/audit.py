"""The audit: reopen what was written and compare it with the source, tensor by tensor.

Structure is checked by the reader (headers, index, offsets) and against what the config block implies; values by
dequantizing every weight. A weight rounded to nearest cannot be further from its source than half a code
(integers) or half a step at the top of the range (FP8): more is a defect, not an accuracy. Where data had a say (GPTQ,
searched ranges) or smoothing rescaled a weight, as the output's record tells, it is the noise that must not be too
much, after the rescaling of columns and rows that fits best.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .attentions import attention_modules, cache_shape, query_heads
from .checkpoint.layout import OutputTensor
from .checkpoint.native import host
from .checkpoint.reader import Checkpoint
from .config.schemes import QuantizationArgs
from .errors import CheckpointError
from .formats.attention import QUERY, query_tensor
from .formats.rows import SEARCHED
from .formats.stacked_source import unsplit
from .models.families import family_of
from .parallel import each, thread_count
from .plan import collapse
from .quantized import QuantizedTensor
from .report.progress import Progress
from .report.table import table
from .rounding import compare, grid

if TYPE_CHECKING:
    from torch import Tensor

    from .formats.rows import RowTensors
    from .formats.source import WeightSource

# Half the distance between neighbouring codes, in units of the scale: 1/2 for integers; e4m3's largest step is 32.
FP8_E4M3_MAX = 448
HALF_STEP = {"int": 0.5, "float": 16.0}
# Half an ulp, relative: a scale stored rounded down makes the largest weight that much more than its last code. In
# fp32 the slack also covers the rounding of 1/scale, of the product and of the dequantized value.
HALF_ULP = {"BF16": 2.0**-9, "F16": 2.0**-12, "F32": 2.0**-22, "U8": 2.0**-22, "F8_E4M3": 2.0**-4}
# Least signal to noise in dB, by bits, of a weight that is not just rounded; rounding gives about 19 and 40.
LEAST_SQNR = {4: 3.0, 8: 15.0}
# A row of one that has more noise than this for each unit of signal holds other values than its source.
MOST_ROW_NOISE = 1.5
RECORD = "quantkit_config.json"
NORM = re.compile(r"norm\d*\.weight$")
# Elements of a weight that are compared at a time in fp32.
CHUNK = 1 << 24
# Of a rounded one in multiples of so many rows, in which zero points fill words.
PART_ROWS = 128
# Bytes at a time of tensors that were carried over.
PART = 1 << 20


@dataclass(frozen=True)
class WeightError:
    """One quantized weight against its source: signal to quantization noise in dB, and the largest |difference|."""

    module: str
    sqnr_db: float
    max_error: float
    max_weight: float


@dataclass(frozen=True)
class Record:
    """How an output was made: each Linear's method, what a transform rescaled of those it changed ("columns", "rows",
    "columns and rows"), and the other tensors that it changed. Without a record everything was rounded to nearest.
    """

    methods: Mapping[str, str] = field(default_factory=dict)
    rescaled: Mapping[str, str] = field(default_factory=dict)
    rewritten: frozenset[str] = frozenset()
    missing: bool = False

    @classmethod
    def of(cls, folder: Path) -> Record:
        """That of the output in `folder`. CheckpointError if it is there and cannot be read."""
        path = folder / RECORD
        if not path.is_file():
            return cls(missing=True)
        try:
            found = json.loads(path.read_bytes())
            methods, rescaled, rewritten = (found.get(key) or () for key in ("methods", "rescaled", "rewritten"))
            return cls(dict(methods), dict(rescaled), frozenset(rewritten))
        except (ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: not a record of quantkit ({error}); quantize again, or remove it") from None

    def is_rounded(self, module: str, args: QuantizationArgs) -> bool:
        """Whether `module`'s codes are the nearest to its source's weight."""
        plain = self.methods.get(module, "rtn") == "rtn" and module not in self.rescaled
        return plain and args.observer not in SEARCHED


@dataclass
class AuditResult:
    """`ok` when nothing is wrong; `problems` say what and where; `weights` has one row per quantized Linear."""

    folder: str
    weights: list[WeightError] = field(default_factory=list)
    carried: int = 0
    rewritten: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def add(self, other: AuditResult) -> None:
        """What `other`, of other tensors, found."""
        self.weights += other.weights
        self.problems += other.problems
        self.carried += other.carried
        self.rewritten += other.rewritten

    def to_json(self) -> str:
        """Everything, for programs: the verdict, the problems, and each weight's figures."""
        return json.dumps({"ok": self.ok} | asdict(self), indent=2)

    def render(self) -> str:
        """The table people read: one row per kind of layer, worst first, and the verdict."""
        kinds: dict[str, list[WeightError]] = defaultdict(list)
        for weight in self.weights:
            kinds[collapse(weight.module)].append(weight)
        rows = []
        for kind, members in sorted(kinds.items(), key=lambda item: min(w.sqnr_db for w in item[1])):
            worst = min(members, key=lambda w: w.sqnr_db)
            mean = sum(w.sqnr_db for w in members) / len(members)
            largest = max(w.max_error for w in members)
            rows.append([kind, len(members), f"{mean:.1f}", f"{worst.sqnr_db:.1f}", worst.module, f"{largest:.2e}"])
        head = ["layer", "n", "SQNR dB (mean)", "worst", "worst layer", "max |error|"]
        lines = [table(head, rows)] if rows else []
        lines += [f"  problem: {problem}" for problem in self.problems]
        verdict = "PASSED" if self.ok else f"FAILED with {len(self.problems)} problem(s)"
        changed = f", {self.rewritten} rescaled in full precision" if self.rewritten else ""
        lines.append(
            f"audit {verdict}: {len(self.weights)} quantized weights, {self.carried} tensors carried over{changed}"
        )
        return "\n".join(lines)


def audit(output: Path, source: Checkpoint, *, progress: bool = True) -> AuditResult:
    """Check the quantized checkpoint in `output` against the full-precision `source` it was made from."""
    from .formats.source import WeightSource

    result = AuditResult(str(output))
    try:
        record = Record.of(output)
        written = Checkpoint(output)
    except CheckpointError as error:
        result.problems.append(str(error))
        return result
    with written:
        if written.config.get("quantization_config") is None:
            result.problems.append(f"{output}/config.json: no quantization_config, so no server would dequantize it")
            return result
        try:
            quantized = WeightSource(written)
        except CheckpointError as error:
            result.problems.append(str(error))
            return result
        source = unsplit(source, lambda stacked, _: not stacked.isdisjoint(written.tensors))
        _check_structure(quantized, source, result)
        if result.ok:
            _check_values(quantized, source, record, result, progress)
            if result.problems and record.missing:
                result.problems.append(f"{RECORD}: missing, so every weight counts as rounded to nearest")
        for path in source.side_files:
            if not (output / path.name).is_file():
                result.problems.append(f"{path.name}: side file of the source is missing")
    return result


def _check_structure(quantized: WeightSource, source: Checkpoint, result: AuditResult) -> None:
    """Exactly the tensors that the config block and the source imply, with the right dtypes and shapes."""
    written, fmt = quantized.checkpoint, quantized.format
    assert fmt is not None
    expected: dict[str, OutputTensor] = {}
    for name, info in source.tensors.items():
        module = quantized.module_of(name)
        if module is not None:
            if len(info.shape) != 2:
                result.problems.append(f"{name}: quantized, but {len(info.shape)}-D in the source")
                continue
            stored = fmt.stored_tensors(module, quantized.schemes[module], info.shape[0], info.shape[1], info.dtype)
            expected.update({t.name: t for t in stored})
        else:
            expected[name] = OutputTensor(name, info.dtype, info.shape)
    if quantized.kv_cache is not None:
        for attention in attention_modules(family_of(source.config), source.tensors):
            stored = fmt.kv_tensors(attention, quantized.kv_cache, cache_shape(source, attention))
            if quantized.queries is not None:
                stored.append(query_tensor(attention, quantized.queries, query_heads(source.config) or 1))
            expected.update({t.name: t for t in stored})
    for name in sorted(set(expected) - set(written.tensors)):
        result.problems.append(f"{name}: missing")
    for name in sorted(set(written.tensors) - set(expected)):
        result.problems.append(f"{name}: not in the source and not part of a quantized layer")
    for name, tensor in expected.items():
        found = written.tensors.get(name)
        if found is not None and (found.dtype, tuple(found.shape)) != (tensor.dtype, tuple(tensor.shape)):
            result.problems.append(
                f"{name}: {found.dtype} {list(found.shape)}, expected {tensor.dtype} {list(tensor.shape)}"
            )
    ignored = set(written.config["quantization_config"].get("ignore") or [])
    for module in sorted(ignored & quantized.modules):
        result.problems.append(f"{module}: quantized and in `ignore` at once")


def _check_values(quantized: WeightSource, source: Checkpoint, record: Record, result: AuditResult, show: bool) -> None:
    family_of(source.config)
    for attention in quantized.cache_quantizers:
        scales = [f"{attention}.{QUERY}"] if attention in quantized.query_quantizers else []
        for name in quantized.cache_names(attention)[:2] + scales:
            _check_scale(name, quantized.checkpoint, result)
    names = list(source.tensors)
    found = [AuditResult("") for _ in names]
    with Progress("audit", total=source.total_bytes, unit="B", enabled=show) as progress:

        def one(index: int) -> None:
            name, own = names[index], found[index]
            module = quantized.module_of(name)
            if module is not None and (rows := _rows_of(module, quantized, source, record)) is not None:
                _check_rows(module, rows, quantized, source, own)
            elif module is not None:
                _check_weight(module, quantized, source, record, own)
            elif name in record.rewritten:
                _check_rewritten(name, quantized.checkpoint, source, own)
            else:
                _check_carried(name, quantized.checkpoint, source, own)
            progress.advance(source.tensors[name].nbytes)

        # Side by side what goes through memory in parts; the others one by one, since each takes a weight's size.
        light = [index for index, name in enumerate(names) if _in_parts(name, quantized, source, record)]
        each(light, one, thread_count())
        for index in sorted(set(range(len(names))) - set(light)):
            one(index)
    for own in found:
        result.add(own)


def _in_parts(name: str, quantized: WeightSource, source: Checkpoint, record: Record) -> bool:
    """Whether tensor `name` is compared without taking memory for all of it."""
    module = quantized.module_of(name)
    if module is None:
        return name not in record.rewritten and name not in source.remade
    return _rows_of(module, quantized, source, record) is not None


def _rows_of(module: str, quantized: WeightSource, source: Checkpoint, record: Record) -> RowTensors | None:
    """The tensors that a weight became which was rounded to nearest, where they can be compared by rows."""
    assert quantized.format is not None
    scheme = quantized.schemes[module]
    rows = quantized.format.row_tensors(module, scheme, *source.tensors[f"{module}.weight"].shape)
    if rows is None or f"{module}.weight" in source.gathered or not record.is_rounded(module, scheme.weights):
        return None
    return rows if rows.scale in quantized.checkpoint.tensors else None


def _check_rows(
    module: str, rows: RowTensors, quantized: WeightSource, source: Checkpoint, result: AuditResult
) -> None:
    """No element may be further away than half a code."""
    written, scheme, name = quantized.checkpoint, quantized.schemes[module], f"{module}.weight"
    assert quantized.format is not None
    for constant, content in rows.constants.items():
        if written.read(constant) != content:
            result.problems.append(f"{constant}: is not what the weight's shape makes it")
            return
    scales = written.scales(rows.scale, *grid(scheme.weights, *source.tensors[name].shape))
    if not scales.positive:
        result.problems.append(f"{rows.scale}: has values that are not finite and positive")
        return
    with written.reading(rows.codes), source.reading(name):
        noise, signal, largest, peak = compare(
            source.stored_weight(name),
            scheme.weights,
            written.place(rows.codes),
            scales,
            written.place(rows.zero_point) if rows.zero_point else None,
            packed=quantized.format.packs(scheme),
        )
    result.weights.append(WeightError(module, _decibels(signal, noise), largest, peak))
    _limit(module, largest, _error_limit(scheme.weights, scales.largest, written.info(rows.scale).dtype), result)
    _check_inputs(module, written, result)


def _check_weight(
    module: str, quantized: WeightSource, source: Checkpoint, record: Record, result: AuditResult
) -> None:
    weight = quantized.quantized(module)
    rounded = record.is_rounded(module, weight.args)
    negative = quantized.schemes[module].scales_may_be_negative and not rounded
    if not _usable(weight.scale, negative):
        wanted = "finite and not zero" if negative else "finite and positive"
        result.problems.append(f"{quantized.scale_name(module)}: has values that are not {wanted}")
        return
    if weight.g_idx is not None and not _even_groups(weight.g_idx, weight.args.group_size or 1):
        result.problems.append(
            f"{module}: its g_idx does not put {weight.args.group_size} of {weight.cols} columns into each group"
        )
        return
    original = source.tensor(f"{module}.weight")
    if rounded:
        _check_rounded(module, original, weight, quantized.scale_dtype(module), result)
    else:
        _check_noise(module, original, weight, record.rescaled.get(module, ""), result)
    _check_inputs(module, quantized.checkpoint, result)
    source.release(f"{module}.weight")
    quantized.release(f"{module}.weight")


def _check_inputs(module: str, written: Checkpoint, result: AuditResult) -> None:
    for part in ("input_scale", "input_global_scale", "weight_global_scale"):
        if f"{module}.{part}" in written.tensors:
            _check_scale(f"{module}.{part}", written, result)


def _check_rounded(
    module: str, original: Tensor, weight: QuantizedTensor, scale_dtype: str, result: AuditResult
) -> None:
    """As `_check_rows`, of a weight in memory."""
    import torch

    from . import ops

    found, unit = [], math.lcm(PART_ROWS, max(1, weight.args.block[0]))
    step = max(1, CHUNK // max(1, weight.cols * unit)) * unit
    for first in range(0, weight.rows, step):
        part = weight.part(first, min(first + step, weight.rows))
        x = original[first : first + step]
        found.append(ops.quantization_error(x, part.unpacked(), part.scale, part.zero_point, weight.args.block))
    figures = torch.stack(found) if found else torch.zeros(1, 4, dtype=torch.float64)
    noise, signal = figures[:, :2].sum(0).tolist()
    largest, peak = figures[:, 2:].amax(0).tolist()  # NaN stays
    result.weights.append(WeightError(module, _decibels(signal, noise), largest, peak))
    _limit(module, largest, _error_limit(weight.args, float(weight.scale.max()), scale_dtype), result)


def _limit(module: str, largest: float, limit: float, result: AuditResult) -> None:
    if not largest <= limit:
        result.problems.append(
            f"{module}: max |error| {largest:.3e} is above {limit:.3e}, half a code at its largest scale"
        )


def _check_noise(module: str, original: Tensor, weight: QuantizedTensor, rescaled: str, result: AuditResult) -> None:
    """The weight as a whole and each of its rows must be recognizable."""
    import torch

    found = weight.dequantize()
    columns, rows = _rescaling(original, found, rescaled)
    signal, noise = torch.zeros(weight.rows), torch.zeros(weight.rows)
    largest = peak = 0.0
    for part in _parts(weight):
        wanted = original[part].float() * columns * rows[part, None]
        error = found[part] - wanted
        signal[part], noise[part] = wanted.square().sum(1), error.square().sum(1)
        largest, peak = max(largest, float(error.abs().max())), max(peak, float(wanted.abs().max()))
    sqnr = _decibels(float(signal.double().sum()), float(noise.double().sum()))
    result.weights.append(WeightError(module, sqnr, largest, peak))
    least = LEAST_SQNR[weight.args.num_bits]
    if not sqnr >= least:
        result.problems.append(
            f"{module}: {sqnr:.1f} dB of signal to noise, and {weight.args.num_bits} bits give at least {least:.0f}; "
            "it does not hold its source's weight"
        )
        return
    bad = ((noise > MOST_ROW_NOISE * signal) & (signal > 0)).nonzero().flatten().tolist()
    if bad:
        shown = ", ".join(map(str, bad[:5])) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        result.problems.append(f"{module}: row{'s' if len(bad) > 1 else ''} {shown}: more noise than signal")


def _rescaling(original: Tensor, found: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """c [cols] and r [rows], none negative, for which r * original * c is nearest to `found`, by turns of least
    squares; 1 unless `what` names them.
    """
    import torch

    rows, cols = original.shape
    c, r = torch.ones(cols), torch.ones(rows)
    for _ in range(3 if " and " in what else 1):
        dot, square = torch.zeros(cols), torch.zeros(cols)
        for part in _parts(found) if "columns" in what else ():
            scaled = original[part].float() * r[part, None]
            dot += (found[part] * scaled).sum(0)
            square += scaled.square().sum(0)
        c = torch.where(square > 0, dot.clamp(min=0) / square, c)
        for part in _parts(found) if "rows" in what else ():
            scaled = original[part].float() * c
            over = scaled.square().sum(1)
            r[part] = torch.where(over > 0, (found[part] * scaled).sum(1).clamp(min=0) / over, r[part])
    return c, r


def _parts(weight: Tensor | QuantizedTensor) -> Iterator[slice]:
    """Rows of a weight, some at a time."""
    rows, cols = (weight.rows, weight.cols) if isinstance(weight, QuantizedTensor) else weight.shape
    step = max(1, CHUNK // max(1, cols))
    return (slice(begin, min(begin + step, rows)) for begin in range(0, rows, step))


def _even_groups(g_idx: Tensor, size: int) -> bool:
    """Whether each group has `size` columns."""
    if g_idx.numel() == 0 or int(g_idx.min()) < 0:
        return g_idx.numel() == 0
    counts = g_idx.long().bincount()
    return counts.numel() * size == g_idx.numel() and bool((counts == size).all())


def _decibels(signal: float, noise: float) -> float:
    return math.inf if noise == 0 else (10 * math.log10(signal / noise) if signal > 0 else -math.inf)


def _check_scale(name: str, written: Checkpoint, result: AuditResult) -> None:
    value = written.tensor(name).float()
    if not _usable(value):
        result.problems.append(f"{name}: {value.flatten().tolist()[:8]} is not finite and positive")


def _check_rewritten(name: str, written: Checkpoint, source: Checkpoint, result: AuditResult) -> None:
    """Dtype and shape are those of the source; values are finite, and a norm has no zeros that its source has not. A
    single one may be chance, where a norm multiplies by 1 + weight.
    """
    import torch

    value, original = written.tensor(name), source.tensor(name)
    if not bool(torch.isfinite(value.float()).all()):
        result.problems.append(f"{name}: rescaled, and has NaN or Inf")
    elif NORM.search(name) and int(((value == 0) & (original != 0)).sum()) > 1:
        result.problems.append(f"{name}: rescaled, and has zeros that the source has not")
    result.rewritten += 1
    source.release(name)
    written.release(name)


def _usable(scale: Tensor, negative: bool = False) -> bool:
    """Whether every scale is finite and positive, or, if it may be negative, not zero."""
    import torch

    return bool((torch.isfinite(scale) & ((scale.abs() if negative else scale) > 0)).all())


def _error_limit(args: QuantizationArgs, largest_scale: float, scale_dtype: str) -> float:
    if args.fp4:  # the last step is 2, and MX cuts off what is up to 7
        return largest_scale * (1.0 + 2 * 6 * HALF_ULP[scale_dtype])
    # How many steps the furthest value is from where the scale was measured: zero, or the other end of the range.
    codes = FP8_E4M3_MAX if args.type == "float" else 1 << (args.num_bits - args.symmetric)
    return largest_scale * (HALF_STEP[args.type] + 2 * codes * HALF_ULP[scale_dtype])


def _check_carried(name: str, written: Checkpoint, source: Checkpoint, result: AuditResult) -> None:
    if not _same_bytes(name, written, source):
        result.problems.append(f"{name}: carried over, but its bytes differ from the source's")
    result.carried += 1
    source.release(name)
    written.release(name)


def _same_bytes(name: str, written: Checkpoint, source: Checkpoint) -> bool:
    nbytes = source.info(name).nbytes
    if nbytes == 0:
        return True
    if name in source.remade:
        import torch

        made, stored = source.tensor(name), written.tensor(name)
        return torch.equal(stored.reshape(-1).view(torch.uint8), made.reshape(-1).view(torch.uint8))
    with written.reading(name), source.reading(name):
        same: bool = host().same_bytes(written.place(name), source.place(name), nbytes, PART)
    return same
