"""The plan as text, for `quantkit plan` and at the head of every run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ..config.schemes import QuantizationArgs
from ..estimate_time import told
from ..plan import Plan, PlannedModule, collapse
from .table import size, table


def render_plan(plan: Plan) -> str:
    """What is quantized and how, what every ignore pattern took out, sizes, and warnings."""
    kinds: Counter[tuple[str, int, int, str, str]] = Counter(
        (collapse(m.name), m.rows, m.cols, m.dtype, how(m)) for m in plan.modules.values()
    )
    lines = [
        f"source   {plan.checkpoint.folder}  ({plan.checkpoint.config.get('model_type', '?')}, "
        f"{len(plan.checkpoint.tensors)} tensors, {size(plan.checkpoint.total_bytes)})",
        f"output   {plan.config.output_dir}  ({plan.format.NAME})",
        f"recipe   {plan.recipe.name}",
        *(f"scheme   {line}" for line in schemes(plan)),
        *(f"smooth   {line}" for line in smoothed(plan)),
        "",
    ]
    if kinds:
        rows = [[name, count, f"{out} x {cols}", dtype, by] for (name, out, cols, dtype, by), count in kinds.items()]
        lines.append(table(["quantized", "n", "out x in", "from", "by"], rows))
    if plan.ignore_matches:
        lines += ["", "ignore_layers" if plan.config.compression.quantization else "ignore"]
        lines += [f"  {pattern}: {kinds_of(names)}" for pattern, names in plan.ignore_matches.items()]
    lines.append(f"kept in full precision: {kinds_of(plan.ignore)}")
    if plan.rewritten:
        lines.append(f"rescaled in full precision: {kinds_of(sorted(plan.rewritten))}")
    e = plan.estimate
    lines += [
        "",
        f"size     {size(e.source_bytes)} -> {size(e.output_bytes)}, "
        f"{e.bits_per_weight:.2f} bits per quantized weight, {len(plan.layout.shards)} file(s)",
        (
            f"memory   about {size(e.memory_bytes)} needed"
            if e.ranks == 1
            else f"memory   about {size(e.rank_bytes)} needed by each of {e.ranks} ranks, {size(e.machine_bytes)} by "
            f"the {e.here} on one machine"
        )
        + (f", {size(e.memory_available)} available" if e.memory_available else "")
        + (f"; {size(e.gram_bytes)} of it for a layer's Gram matrices, in x in for each input" if e.gram_bytes else "")
        + (f"; {size(e.held_bytes)} for activations, one forward a layer" if e.held_bytes else "")
        + (f"; {means}" if (means := plan.means.describe()) else ""),
        f"disk     {size(e.output_bytes)} needed, "
        + (f"{size(e.choice.scratch)} for hidden states, " if e.choice is not None and e.choice.scratch else "")
        + f"{size(e.disk_available)} free",
    ]
    lines += told(plan)
    if plan.statistics is not None:
        lines.append(f"inputs   {plan.statistics.told()}")
    lines += [f"note     {note}" for note in plan.config.notes]
    lines += [f"warning  {warning}" for warning in plan.warnings]
    return "\n".join(lines)


def schemes(plan: Plan) -> list[str]:
    """One line for each distinct scheme, and one for the KV cache: what it is, and for how many Linears."""
    counts = Counter(m.scheme for m in plan.modules.values())
    lines = []
    for scheme, count in counts.items():
        inputs = scheme.input_activations
        lines.append(
            f"{scheme.name}: weights {describe(scheme.weights)}; activations "
            f"{describe(inputs) if inputs else 'not quantized'}" + (f" ({count} Linears)" if len(counts) > 1 else "")
        )
    if plan.kv_cache is not None:
        lines.append(f"KV cache: {describe(plan.kv_cache)} ({len(plan.attentions)} attention layers)")
    if plan.attention is not None:
        lines.append(f"queries: as the KV cache, in {plan.attention.targets[0]}")
    return lines


def smoothed(plan: Plan) -> list[str]:
    """One line for each transform and kind of place: what divides, and what reads it."""
    lines = []
    for index, places in plan.smoothings.items():
        name = plan.recipe.modifiers[index].kind
        kinds = Counter((collapse(p.smooth), kinds_of(p.balance)) for p in places)
        lines += [f"{name}: {smooth} -> {readers} x{count}" for (smooth, readers), count in kinds.items()]
    return lines


def how(module: PlannedModule) -> str:
    """`gptq W4A16` and the like."""
    return f"{module.modifier.kind} {module.scheme.name}"


def kinds_of(names: Iterable[str]) -> str:
    """Names that differ in numbers only, told once: `model.layers.*.mlp.up_proj x28, lm_head`."""
    counts = Counter(collapse(name) for name in names)
    return ", ".join(f"{name} x{count}" if count > 1 else name for name, count in counts.items())


def describe(args: QuantizationArgs) -> str:
    """`int4 group 128, symmetric` and the like."""
    kind = f"int{args.num_bits}" if args.type == "int" else "FP8 e4m3"
    if args.scales != "float":
        kind = "NVFP4" if args.scales == "nvfp4" else f"MXFP{args.num_bits}"
    where = f"group {args.group_size}" if args.group_size else f"per {args.strategy}"
    if args.block_structure:
        where = f"block {args.block_structure[0]}x{args.block_structure[1]}"
    words = [kind, where]
    if args.type == "int":
        words.append("symmetric" if args.symmetric else "asymmetric")
    if args.outlier_threshold is not None:
        words.append(f"outliers from {args.outlier_threshold:g} on in 16 bit")
    if args.dynamic == "local":
        words.append("dynamic in a static range")
    elif args.dynamic:
        words.append("dynamic")
    return " ".join(words[:2]) + "".join(f", {word}" for word in words[2:])
