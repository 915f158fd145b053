"""GPTQ (Frantar et al., 2022) over the Linears of a layer: one factor per input, one sweep for all its readers, experts
of one shape together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import ops
from ..calibration.expert_groups import projection
from ..calibration.layer_run import merged_experts
from ..calibration.statistics import Statistics
from ..config.recipe import GPTQModifier
from ..config.schemes import QuantizationArgs
from ..distributed import ONE, Ranks
from ..errors import CalibrationError
from ..plan import PlannedModule
from ..quantized import QuantizedTensor
from .division import gathered, own_rows, owners, row_counts
from .given_scales import given_scales
from .rtn import check_finite, quantize_weight
from .shared import GlobalScales
from .working import Working

# Rows of the weight from which the output's energy is estimated, for the relative loss.
SAMPLE_ROWS = 64
# Copies of Gram matrices and factors that one batch of experts may hold.
BATCH_BYTES = 256 << 20
PERMUTED_ROWS = 128
# How far a group's range is shrunk in search of the least error, and in how many steps: 4 bit gain a tenth of their KL
# by it, 8 bit nothing.
SEARCH = {True: (0.25, 5), False: (0.3, 6)}  # by symmetry


@dataclass(frozen=True)
class Outcome:
    """What happened to one Linear. `loss`: mean squared change of its output per token and channel; `relative`: that
    over the output's mean square (estimated from some rows); `dampening`: the share that made the Gram matrix positive
    definite; `dead`: inputs that are always zero.
    """

    quantized: QuantizedTensor
    method: str
    tokens: int
    loss: float | None = None
    relative: float | None = None
    dampening: float | None = None
    dead: int = 0


@dataclass(frozen=True)
class Job:
    """Linears that read one input and are quantized alike: their rows make one matrix."""

    seen: Statistics
    members: tuple[str, ...]
    args: QuantizationArgs
    scale_dtype: torch.dtype
    rows: int
    cols: int
    signs: bool

    @property
    def cost(self) -> float:
        """Of its factor and its sweep, in multiplications."""
        return self.cols**3 / 6 + self.rows * self.cols**2 / 2

    @property
    def shape(self) -> tuple[object, ...]:
        """What jobs of one batch have in common."""
        return self.args, self.scale_dtype, self.rows, self.cols, self.signs


def quantize(
    modifier: GPTQModifier,
    names: Iterable[str],
    working: Working,
    modules: Mapping[str, PlannedModule],
    scale_dtypes: Mapping[str, torch.dtype],
    packs: Mapping[str, bool],
    shared: GlobalScales,
    ranks: Ranks = ONE,
) -> dict[str, Outcome]:
    """Every Linear in `names`, by the statistics of its input. Of several `ranks` each works on some rows of a dense
    Linear, and on some experts; the result is the same on all.
    """
    found: dict[str, Outcome] = {}
    inputs: dict[tuple[int, QuantizationArgs, torch.dtype, bool], tuple[Statistics, list[str]]] = {}
    extended: dict[int, Statistics] = {}
    for name in names:
        seen = working.statistics[name]
        if ".experts." in name and seen.count < modifier.min_tokens_per_module:
            if modifier.low_data == "error":
                raise CalibrationError(
                    f"{name}: only {seen.count} calibration tokens reached this expert, and min_tokens_per_module is "
                    f"{modifier.min_tokens_per_module}; use more data, or low_data: rtn or all_tokens"
                )
            if modifier.low_data == "rtn":
                found[name] = _rtn(name, seen.count, working, modules, scale_dtypes, packs, shared)
                continue
            if id(seen) not in extended:
                extended[id(seen)] = _with_all_tokens(name, seen, working)
            seen = extended[id(seen)]
        scheme = modules[name].scheme
        key = (id(seen), scheme.weights, scale_dtypes[name], modifier.signed_scales and scheme.scales_may_be_negative)
        inputs.setdefault(key, (seen, []))[1].append(name)
    jobs = [
        Job(seen, tuple(members), args, dtype, sum(modules[m].rows for m in members), modules[members[0]].cols, signs)
        for (_, args, dtype, signs), (seen, members) in inputs.items()
    ]
    few = {id(seen) for seen in extended.values()}

    def work(jobs: Sequence[Job], ranks: Ranks) -> dict[str, Outcome]:
        made: dict[str, Outcome] = {}
        for batch in _batches(jobs):
            for job, outcomes in zip(batch, _sweep(modifier, batch, working, packs, shared, ranks), strict=True):
                method = "gptq (few tokens)" if id(job.seen) in few else "gptq"
                made.update({name: replace(outcome, method=method) for name, outcome in outcomes.items()})
        return made

    if ranks.world == 1:
        return found | work(jobs, ranks)
    experts = [job for job in jobs if ".experts." in job.members[0]]
    of = owners([job.cost for job in experts], ranks)
    mine = [job for job, owner in zip(experts, of, strict=True) if owner == ranks.rank]
    made = gathered(work(mine, ONE), ranks) if experts else {}
    made |= work([job for job in jobs if ".experts." not in job.members[0]], ranks)
    return found | {name: made[name] for job in jobs for name in job.members}


def _rtn(
    name: str,
    tokens: int,
    working: Working,
    modules: Mapping[str, PlannedModule],
    scale_dtypes: Mapping[str, torch.dtype],
    packs: Mapping[str, bool],
    shared: GlobalScales,
) -> Outcome:
    quantized = quantize_weight(
        name,
        working.weight(name),
        modules[name].scheme.weights,
        scale_dtype=scale_dtypes[name],
        pack=packs[name],
        global_scale=shared.of(name, working.weight),
    )
    return Outcome(quantized, "rtn (few tokens)", tokens)


def _with_all_tokens(name: str, seen: Statistics, working: Working) -> Statistics:
    """What all experts of the layer saw, the count still this one's; a borrowed input is that already."""
    pool = working.layer.pools.get(projection(name), seen)
    found = pool.copy() if pool is not seen or not seen.count else merged_experts(name, working.statistics)
    found.count = seen.count
    return found


def _batches(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """Neighbours of one shape together, as far as memory allows; alone where each has groups in an order of its own."""
    batch: list[Job] = []
    for job in jobs:
        alone = job.args.type == "float" and job.args.block[1] != -1
        full = alone or (len(batch) + 1) * 2 * 4 * (job.cols**2 + job.rows * job.cols) > BATCH_BYTES
        if batch and (full or job.shape != batch[0].shape):
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch


def _order(modifier: GPTQModifier, diagonal: Tensor, group_size: int, given: bool) -> Tensor | None:
    """The order in which columns are taken, the largest inputs first. Groups that stay where they are ("weight") are
    taken whole, so that each gets its scale from the weights as updated by then; with scales that are `given` nothing
    is gained by that.
    """
    if modifier.actorder is None:
        return None
    if modifier.actorder == "group" or group_size == -1 or given:
        return torch.argsort(diagonal, descending=True, stable=True)
    whole = len(diagonal) // group_size * group_size  # a shorter last group stays the last
    groups = diagonal[:whole].view(-1, group_size)
    outer = torch.argsort(groups.mean(1), descending=True, stable=True)
    inner = torch.argsort(groups, dim=1, descending=True, stable=True)
    last = whole + torch.argsort(diagonal[whole:], descending=True, stable=True)
    return torch.cat([(outer[:, None] * group_size + inner[outer]).reshape(-1), last])


def _factor(modifier: GPTQModifier, grams: Tensor, batch: Sequence[Job]) -> tuple[Tensor, list[int], list[float]]:
    """The factors of `grams` [jobs, K, K], dead columns and dampening of each. One that is not positive definite is
    tried again with more; CalibrationError if nothing helps.
    """
    try:
        factor, dead = ops.gptq_factor(grams, modifier.dampening_frac)
        return factor, dead.sum(1).tolist(), [modifier.dampening_frac] * len(batch)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        pass
    found = []
    for gram, job in zip(grams, batch, strict=True):
        try:
            found.append(ops.factor_with_retry(gram, modifier.dampening_frac))
        except RuntimeError as error:
            raise CalibrationError(
                f"{job.members[0]}: the Gram matrix of its input is not positive definite, whatever the dampening "
                f"({error}); give more or more varied calibration data, or quantize this layer with "
                "QuantizationModifier"
            ) from None
    factors = torch.stack([factor for factor, _, _ in found])
    return factors, [int(dead.sum()) for _, dead, _ in found], [used for _, _, used in found]


def _sweep(
    modifier: GPTQModifier,
    batch: Sequence[Job],
    working: Working,
    packs: Mapping[str, bool],
    shared: GlobalScales,
    ranks: Ranks,
) -> list[dict[str, Outcome]]:
    """All jobs of one shape at once; each one's rows are cut apart again. `ranks` share the rows."""
    args, cols, size = batch[0].args, batch[0].cols, batch[0].args.block[1]
    floats = args.type == "float"
    one_scale = args.strategy == "tensor" and not floats
    mine = own_rows(batch[0].rows, ranks)
    weights, grams, orders = [], [], []
    for job in batch:
        gram = job.seen.gram
        assert gram is not None
        order = _order(modifier, gram.diagonal(), size, floats)
        parts = [working.weight(name) for name in job.members]
        for name, part in zip(job.members, parts, strict=True):
            check_finite(name, part, part.abs().amax())
        weight = torch.cat(parts)[slice(None) if one_scale else mine].float()
        weights.append(weight if order is None else weight.gather(1, order.expand_as(weight)))
        grams.append(gram if order is None else _permuted(gram, order))
        orders.append(order)
    factor, dead, dampening = _factor(modifier, _stacked(grams), batch)
    weight = _stacked(weights)
    given = given_scales(batch, weight, working, shared).of_rows(mine)
    weight = weight[:, mine] if one_scale else weight
    q_min, q_max = args.q_range
    search_range, search_steps = SEARCH[args.symmetric] if args.num_bits == 4 and not floats else (0.0, 0)
    # Where groups stay in place and columns do not, the sweep is told the group of each.
    given_order = orders[0] if floats and size != -1 else None
    codes, scale, zero, loss = ops.gptq_sweep(
        weight,
        factor,
        g_idx=None if given_order is None else (given_order // size).to(torch.int32),
        q_min=q_min,
        q_max=q_max,
        group_size=size,
        scale=given.scale,
        zero_point=given.zero_point,
        symmetric=args.symmetric,
        divisor=args.divisor,
        scale_dtype=torch.float32 if floats else batch[0].scale_dtype,
        search_range=search_range,
        search_steps=search_steps,
        signs=batch[0].signs,
        float_bits=args.num_bits if floats else 0,
    )
    codes = codes.view(torch.int8)
    counts = row_counts(batch[0].rows, ranks)
    found: list[dict[str, Outcome]] = []
    for i, job in enumerate(batch):
        found.append({})
        order, g_idx = orders[i], None
        job_codes, job_scale, job_zero = codes[i], scale[i], None if args.symmetric else zero[i]
        if order is not None:
            job_codes = torch.empty_like(job_codes).index_copy_(1, order, job_codes)
            if modifier.actorder == "group" and size != -1:
                places = torch.arange(cols, dtype=torch.int32) // size
                g_idx = torch.empty_like(places).index_copy_(0, order, places)
            elif size != -1 and not floats:
                groups = torch.argsort(order[::size] // size)
                job_scale = job_scale[:, groups]
                job_zero = None if job_zero is None else job_zero[:, groups]
        together = not floats and all(packs[name] for name in job.members)
        if together:
            job_codes = ops.pack_int32(job_codes, args.num_bits)
        made = [job_codes, job_scale, loss[i], *([] if job_zero is None else [job_zero])]
        job_codes, job_scale, job_loss, *rest = ranks.gather_rows(made, counts)
        job_zero = rest[0] if rest else None
        begin = 0
        for name in job.members:
            rows = slice(begin, begin + working.weight(name).shape[0])
            begin = rows.stop
            part_scale, part_zero = job_scale[rows], None if job_zero is None else job_zero[rows]
            if one_scale:
                part_scale, part_zero = part_scale[:1], None if part_zero is None else part_zero[:1]
            part_codes = job_codes[rows]
            if floats:
                quantized = given.filled(name, part_codes)
            else:
                packed = ops.pack_int32(part_codes, args.num_bits) if packs[name] and not together else part_codes
                quantized = QuantizedTensor(
                    packed, part_scale, part_zero, args, part_codes.shape[0], cols, packs[name], g_idx=g_idx
                )
            total = 2.0 * float(job_loss[rows].sum(dtype=torch.float64))
            power = energy(working.weight(name), job.seen)
            found[i][name] = Outcome(
                quantized,
                "gptq",
                job.seen.count,
                loss=total / (max(1, job.seen.count) * part_codes.shape[0]),
                relative=total / power if power > 0 else None,
                dampening=dampening[i],
                dead=dead[i],
            )
    return found


def _permuted(gram: Tensor, order: Tensor) -> Tensor:
    """Rows and columns of `gram` in this order, some rows at a time: a copy of them all would count at the peak."""
    found = torch.empty_like(gram)
    for rows, into in zip(order.split(PERMUTED_ROWS), found.split(PERMUTED_ROWS), strict=True):
        torch.gather(gram[rows], 1, order.expand(len(rows), -1), out=into)
    return found


def _stacked(matrices: list[Tensor]) -> Tensor:
    """[n, rows, columns], a view of a single one; the list is empty then."""
    one = matrices[0].unsqueeze(0) if len(matrices) == 1 else torch.stack(matrices)
    matrices.clear()
    return one


def energy(weight: Tensor, seen: Statistics) -> float:
    """tr(W G W^T), the squared output over all tokens, estimated from evenly spaced rows."""
    assert seen.gram is not None
    sample = weight[:: -(-weight.shape[0] // SAMPLE_ROWS)].float()
    return float((sample @ seen.gram).mul_(sample).sum(dtype=torch.float64)) * weight.shape[0] / sample.shape[0]
