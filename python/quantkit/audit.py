"""The audit: reopen what was written and compare it with the source, tensor by tensor.

Structure is checked by the reader (headers, index, offsets) and against the plan's tensor list; values by
dequantizing every weight. A weight rounded to nearest cannot be further from its source than half a code
(integers) or half a step at the top of the range (FP8): more is a defect, not an accuracy.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoint.layout import OutputTensor
from .checkpoint.reader import Checkpoint
from .config.schemes import QuantizationArgs
from .errors import CheckpointError
from .plan import collapse
from .report.progress import Progress
from .report.table import table

if TYPE_CHECKING:
    from torch import Tensor

    from .formats.source import WeightSource

# Half the distance between neighbouring codes, in units of the scale: 1/2 for integers; e4m3's largest step is 32.
FP8_E4M3_MAX = 448
HALF_STEP = {"int": 0.5, "float": 16.0}
# Half an ulp, relative: a scale stored rounded down makes the largest weight that much more than its last code. In
# fp32 the slack also covers the rounding of 1/scale, of the product and of the dequantized value.
HALF_ULP = {"BF16": 2.0**-9, "F16": 2.0**-12, "F32": 2.0**-22}


@dataclass(frozen=True)
class WeightError:
    """One quantized weight against its source: signal to quantization noise in dB, and the largest |difference|."""

    module: str
    sqnr_db: float
    max_error: float
    max_weight: float


@dataclass
class AuditResult:
    """`ok` when nothing is wrong; `problems` say what and where; `weights` has one row per quantized Linear."""

    folder: str
    weights: list[WeightError] = field(default_factory=list)
    carried: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

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
        lines.append(f"audit {verdict}: {len(self.weights)} quantized weights, {self.carried} tensors carried over")
        return "\n".join(lines)


def audit(output: Path, source: Checkpoint, *, progress: bool = True) -> AuditResult:
    """Check the quantized checkpoint in `output` against the full-precision `source` it was made from."""
    from .formats.source import WeightSource

    result = AuditResult(str(output))
    try:
        written = Checkpoint(output)
    except CheckpointError as error:
        result.problems.append(str(error))
        return result
    with written:
        if written.config.get("quantization_config") is None:
            result.problems.append(f"{output}/config.json: no quantization_config, so no server would dequantize it")
            return result
        quantized = WeightSource(written)
        _check_structure(quantized, source, result)
        if result.ok:
            _check_values(quantized, source, result, progress)
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


def _check_values(quantized: WeightSource, source: Checkpoint, result: AuditResult, show: bool) -> None:
    with Progress("audit", total=source.total_bytes, unit="B", enabled=show) as progress:
        for name, info in source.tensors.items():
            module = quantized.module_of(name)
            if module is not None:
                _check_weight(module, quantized, source, result)
            else:
                _check_carried(name, quantized.checkpoint, source, result)
            progress.advance(info.nbytes)


def _check_weight(module: str, quantized: WeightSource, source: Checkpoint, result: AuditResult) -> None:
    from . import ops

    weight = quantized.quantized(module)
    original = source.tensor(f"{module}.weight")
    scale = weight.scale
    if not _usable(scale):
        result.problems.append(f"{module}.weight_scale: has values that are not finite and positive")
        return
    figures = ops.quantization_error(original, weight.unpacked(), scale, weight.zero_point, weight.args.block)
    noise, signal, largest, peak = figures.tolist()
    sqnr = math.inf if noise == 0 else (10 * math.log10(signal / noise) if signal > 0 else -math.inf)
    result.weights.append(WeightError(module, sqnr, largest, peak))
    limit = _error_limit(weight.args, float(scale.max()), quantized.scale_dtype(module))
    if not largest <= limit:
        result.problems.append(
            f"{module}: max |error| {largest:.3e} is above {limit:.3e}, half a code at its largest scale"
        )
    stored = f"{module}.input_scale"
    if stored in quantized.checkpoint.tensors:
        value = quantized.checkpoint.tensor(stored).float()
        if not _usable(value):
            result.problems.append(f"{stored}: {value.flatten().tolist()} is not finite and positive")
    source.release(f"{module}.weight")
    quantized.release(f"{module}.weight")


def _usable(scale: Tensor) -> bool:
    """Whether every scale is finite and positive."""
    import torch

    return bool((torch.isfinite(scale) & (scale > 0)).all())


def _error_limit(args: QuantizationArgs, largest_scale: float, scale_dtype: str) -> float:
    codes = FP8_E4M3_MAX if args.type == "float" else 1 << (args.num_bits - 1)
    return largest_scale * (HALF_STEP[args.type] + 2 * codes * HALF_ULP[scale_dtype])


def _check_carried(name: str, written: Checkpoint, source: Checkpoint, result: AuditResult) -> None:
    import torch

    if not torch.equal(_raw(written, name), _raw(source, name)):
        result.problems.append(f"{name}: carried over, but its bytes differ from the source's")
    result.carried += 1
    source.release(name)
    written.release(name)


def _raw(checkpoint: Checkpoint, name: str) -> Tensor:
    """The bytes of a tensor, of whatever dtype."""
    import torch

    info = checkpoint.info(name)
    if info.nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    mapped = checkpoint.mapped(info.file)
    return torch.frombuffer(mapped, dtype=torch.uint8, count=info.nbytes, offset=info.begin)
