"""The plan as text, for `quantkit plan` and at the head of every run."""

from __future__ import annotations

from collections import Counter

from ..config.schemes import QuantizationArgs
from ..plan import Plan, collapse
from .table import size, table


def render_plan(plan: Plan) -> str:
    """What is quantized and how, what every ignore pattern took out, sizes, and warnings."""
    kinds: Counter[tuple[str, int, int, str]] = Counter(
        (collapse(m.name), m.rows, m.cols, m.dtype) for m in plan.modules.values()
    )
    weights, inputs = plan.scheme.weights, plan.scheme.input_activations
    lines = [
        f"source   {plan.checkpoint.folder}  ({plan.checkpoint.config.get('model_type', '?')}, "
        f"{len(plan.checkpoint.tensors)} tensors, {size(plan.checkpoint.total_bytes)})",
        f"output   {plan.config.output_dir}  ({plan.format.NAME})",
        f"scheme   {plan.scheme.name}: weights {describe(weights)}; "
        f"activations {describe(inputs) if inputs else 'not quantized'}",
        "",
        table(
            ["quantized", "n", "out x in", "from"],
            [[name, count, f"{rows} x {cols}", dtype] for (name, rows, cols, dtype), count in kinds.items()],
        ),
    ]
    if plan.ignore_matches:
        lines += ["", "ignore_layers"]
        for pattern, names in plan.ignore_matches.items():
            shown = Counter(collapse(name) for name in names)
            lines.append(f"  {pattern}: " + ", ".join(f"{n} x{c}" if c > 1 else n for n, c in shown.items()))
    kept = Counter(collapse(name) for name in plan.ignore)
    lines.append("kept in full precision: " + ", ".join(f"{n} x{c}" if c > 1 else n for n, c in kept.items()))
    e = plan.estimate
    lines += [
        "",
        f"size     {size(e.source_bytes)} -> {size(e.output_bytes)}, "
        f"{e.bits_per_weight:.2f} bits per quantized weight, {len(plan.layout.shards)} file(s)",
        f"memory   about {size(e.memory_bytes)} needed"
        + (f", {size(e.memory_available)} available" if e.memory_available else ""),
        f"disk     {size(e.output_bytes)} needed, {size(e.disk_available)} free",
    ]
    lines += [f"note     {note}" for note in plan.config.notes]
    lines += [f"warning  {warning}" for warning in plan.warnings]
    return "\n".join(lines)


def describe(args: QuantizationArgs) -> str:
    """`int4 group 128, symmetric` and the like."""
    kind = f"int{args.num_bits}" if args.type == "int" else "FP8 e4m3"
    where = f"group {args.group_size}" if args.group_size else f"per {args.strategy}"
    if args.block_structure:
        where = f"block {args.block_structure[0]}x{args.block_structure[1]}"
    words = [kind, where]
    if args.type == "int":
        words.append("symmetric" if args.symmetric else "asymmetric")
    if args.dynamic:
        words.append("dynamic")
    return " ".join(words[:2]) + "".join(f", {word}" for word in words[2:])
