"""How long a run takes: what there is to do, counted from headers, over how fast a machine does it.

The rates of a CPU are measured by benchmarks/rates.py; those of GPUs are assumptions on paper, and say so.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

from .config.recipe import AWQModifier
from .memory import Demand
from .models.families import text_config

if TYPE_CHECKING:
    from .plan import Plan, PlannedModule

# AWQ tries its grid on so many rows of a weight, and the best few on all.
SAMPLED_ROWS, FINALISTS = 256, 4


@dataclass(frozen=True)
class Work:
    """`forward`, `experts` (routed ones, whose batches are small), `gram`, `factor`, `sweep`, `search`: multiply-adds,
    as if nothing were symmetric or triangular. `round`: weights. `linears`: what each costs whatever its size. `read`,
    `write`, `audit`: bytes.
    """

    forward: float = 0.0
    experts: float = 0.0
    gram: float = 0.0
    factor: float = 0.0
    sweep: float = 0.0
    search: float = 0.0
    round: float = 0.0
    linears: float = 0.0
    read: float = 0.0
    write: float = 0.0
    audit: float = 0.0


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second, in the units of `Work`. `basis`: how that is known. `cores` that it was measured
    on: all but disks are taken to be in proportion to them. `start`, `calibrating`: seconds of a whole process that has
    next to nothing to do, without data and with them: Python, imports, the plan.
    """

    name: str
    basis: str
    cores: int
    work: Work
    start: float
    calibrating: float


DISK = ("read", "write")
# Medians that benchmarks/rates.py printed; see docs/benchmarks.md.
CPU = Rates(
    "a Zen 5's with AVX-512",
    "measured",
    2,
    Work(
        forward=5.2e11,
        experts=3.2e11,
        gram=8.2e11,
        factor=1.1e12,
        sweep=4.7e11,
        search=7.0e11,
        round=1.1e10,
        linears=1.0e3,
        read=3.5e9,
        write=4.4e8,
        audit=7.3e9,
    ),
    start=1.5,
    calibrating=4.4,
)
# NVIDIA's data sheet of the H100 SXM: 989 TFLOPS bf16 and 495 TF32 with dense operands, 67 fp32, HBM 3.35 TB/s. Two
# operations are a multiply-add. Assumed of that: 40 % in forwards, 15 % where experts get few tokens, 30 % for Gram
# matrices (TF32), 10 % of fp32 for factors and sweeps, 30 % for AWQ's grid; weights rounded at 20 % of HBM (2 bytes
# each); 10 ms a calibrated Linear for Python, launches and copies; NVMe disks at 6 and 3 GB/s; the audit as fast as its
# reading.
H100 = Rates(
    "H100",
    "computed, not measured",
    1,
    Work(
        forward=0.40 * 989e12 / 2,
        experts=0.15 * 989e12 / 2,
        gram=0.30 * 495e12 / 2,
        factor=0.10 * 67e12 / 2,
        sweep=0.10 * 67e12 / 2,
        search=0.30 * 67e12 / 2,
        round=0.20 * 3.35e12 / 2,
        linears=1e2,
        read=6e9,
        write=3e9,
        audit=6e9,
    ),
    start=10.0,
    calibrating=20.0,
)
# Of what several processes could do together, what is left: benchmarks/ranks.py measured 1.64 and 1.69 for two on CPUs.
# More of them, and GPUs, are taken to keep as much, which nobody has measured.
SHARED = 0.82


def work_of(plan: Plan) -> Work:
    """What a run of `plan` does."""
    sizes = plan.estimate
    read, write = float(sizes.source_bytes), float(sizes.output_bytes)
    everything = Work(
        round=float(sum(m.rows * m.cols for m in plan.modules.values())), read=read, write=write, audit=read + write
    )
    if not plan.recipe.needs_data:
        return everything
    demand = _demand(plan)
    tokens = demand.tokens if plan.statistics is None else 0
    found = {**asdict(everything), "linears": float(len(plan.modules))}
    if tokens:
        found["forward"], found["experts"] = _forwards(plan, tokens)
    awq = next((m for m in plan.recipe.modifiers if isinstance(m, AWQModifier)), None)
    for name, cols in demand.inputs.items():
        seen = tokens * (_routed_share(plan) if plan.family.is_expert(name) else 1.0)
        found["gram"] += seen * cols**2
        if plan.statistics is not None:
            found["read"] += 2 * cols**2
        if plan.modules[name].modifier.kind == "gptq":
            found["factor"] += cols**3
    for module in plan.modules.values():
        if module.modifier.kind == "gptq":
            found["sweep"] += _area(module) * module.cols
        if awq is not None and module.scheme.weights.type == "int":
            rows = awq.n_grid * min(SAMPLED_ROWS, module.rows) + FINALISTS * module.rows
            found["search"] += rows * module.cols**2
    return Work(**found)


def _demand(plan: Plan) -> Demand:
    places = [place for group in plan.smoothings.values() for place in group]
    return Demand(plan.config, plan.checkpoint, plan.family, plan.modules, places)


def _area(module: PlannedModule) -> float:
    return float(module.rows) * module.cols


def _routed_share(plan: Plan) -> float:
    """Of all tokens, how many an expert sees on average."""
    text = text_config(plan.checkpoint.config)
    experts = text.get("num_experts") or text.get("n_routed_experts") or text.get("num_local_experts")
    each = text.get("num_experts_per_tok")
    if plan.recipe.all_experts or not isinstance(experts, int) or not isinstance(each, int):
        return 1.0
    return min(1.0, each / experts)


def _forwards(plan: Plan, tokens: int) -> tuple[float, float]:
    """Multiply-adds of all forwards: of experts, and of all else. A layer takes two where statistics are worked on that
    one forward does not give.
    """
    family, text = plan.family, text_config(plan.checkpoint.config)
    weights: dict[int, float] = {}
    routed: dict[int, float] = {}
    for name, info in plan.checkpoint.tensors.items():
        layer = family.layer_of(name)
        if layer is None or len(info.shape) not in (2, 3) or not name.endswith(("weight", "_proj")):
            continue
        size = 1.0
        for extent in info.shape:
            size *= extent
        into = routed if family.is_expert(name.removesuffix(".weight")) or len(info.shape) == 3 else weights
        into[layer] = into.get(layer, 0.0) + size
    heads = int(text.get("num_attention_heads") or 0) * family.head_dim
    length = plan.config.dataset.max_seq_length if plan.config.dataset is not None else 0
    worked = bool(_demand(plan).inputs) or any(plan.smoothings.values())
    awq = any(isinstance(m, AWQModifier) for m in plan.recipe.modifiers)
    dense, experts = 0.0, 0.0
    for layer in range(family.num_layers):
        once = not worked or (plan.means.forwards != 2 and not awq and layer not in routed)
        times = 1 if once else 2
        # Queries with keys and their weights with values, half of them behind the causal mask.
        dense += times * tokens * (weights.get(layer, 0.0) + length * heads)
        experts += times * tokens * routed.get(layer, 0.0) * _routed_share(plan)
    return dense, experts


def seconds(work: Work, rates: Rates, *, cores: float | None = None, devices: int = 1) -> dict[str, float]:
    """By stage: compute and disks, which go on at once, and the audit behind them. `cores` of a CPU to work with,
    `devices` that share the work.
    """
    scale = (cores or rates.cores) / rates.cores
    if devices > 1:
        scale *= devices * SHARED
    spent = {
        f.name: getattr(work, f.name) / (getattr(rates.work, f.name) * (1.0 if f.name in DISK else scale))
        for f in fields(Work)
    }
    # However many read the files, it is the disk that gives them.
    spent["audit"] = max(spent["audit"], work.audit / rates.work.read)
    spent["start"] = rates.calibrating if work.linears else rates.start
    return spent


def total(spent: dict[str, float]) -> float:
    """The whole run: computing while disks read and write, then the audit."""
    compute = sum(value for key, value in spent.items() if key not in (*DISK, "audit", "start"))
    return spent["start"] + max(compute, *(spent[key] for key in DISK)) + spent["audit"]


def told(plan: Plan) -> Iterable[str]:
    """Lines of the plan: how long it takes on CPUs like the measured one, and on paper on GPUs."""
    work, ranks, there = work_of(plan), plan.estimate.ranks, len(os.sched_getaffinity(0))
    threads = plan.config.global_.num_threads or max(1, there // plan.estimate.here)
    spent = seconds(work, CPU, cores=threads, devices=ranks)
    largest = sorted((key for key in spent if spent[key] >= 0.01), key=lambda key: -spent[key])[:3]
    parts = ", ".join(f"{key} {spell(spent[key])}" for key in largest)
    what = f"{threads} core{'s' if threads > 1 else ''}"
    what = what if ranks == 1 else f"{ranks} ranks of {what}"
    yield f"time     about {spell(total(spent))} on {what} like {CPU.name} ({CPU.basis}): {parts}"
    one, eight = (total(seconds(work, H100, devices=n)) for n in (1, 8))
    yield f"         {spell(one)} on one {H100.name}, {spell(eight)} on eight ({H100.basis})"


def spell(duration: float) -> str:
    """`40 s`, `12 min`, `3.4 h`, `5.1 days`."""
    for unit, size, most in (("s", 1.0, 100.0), ("min", 60.0, 6000.0), ("h", 3600.0, 72 * 3600.0)):
        if duration < most:
            value = duration / size
            return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"
    return f"{duration / 86400:.1f} days"
