"""GPTQ (Frantar et al., 2022) over the Linears of a layer: one factor per input, one sweep for all its readers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import ops
from ..calibration.statistics import Statistics
from ..calibration.sweep import merged_experts
from ..config.recipe import GPTQModifier
from ..config.schemes import QuantizationArgs
from ..errors import CalibrationError
from ..plan import PlannedModule
from ..quantized import QuantizedTensor
from .rtn import quantize_weight, weight_scale
from .working import Working

# Rows of the weight from which the output's energy is estimated, for the relative loss.
SAMPLE_ROWS = 64


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


def quantize(
    modifier: GPTQModifier,
    names: Iterable[str],
    working: Working,
    modules: Mapping[str, PlannedModule],
    scale_dtypes: Mapping[str, torch.dtype],
    packs: Mapping[str, bool],
) -> dict[str, Outcome]:
    """Every Linear in `names`, by the statistics of its input."""
    found: dict[str, Outcome] = {}
    inputs: dict[tuple[int, QuantizationArgs, torch.dtype], tuple[Statistics, list[str]]] = {}
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
                found[name] = _rtn(name, seen.count, working, modules, scale_dtypes, packs)
                continue
            if id(seen) not in extended:
                extended[id(seen)] = _with_all_tokens(name, seen, working)
            seen = extended[id(seen)]
        key = (id(seen), modules[name].scheme.weights, scale_dtypes[name])
        inputs.setdefault(key, (seen, []))[1].append(name)
    factors: dict[int, Factor] = {}
    for (identity, args, dtype), (seen, members) in inputs.items():
        if identity not in factors:
            factors.clear()  # readers of one input follow one another; no more than one factor is held
            factors[identity] = factor(modifier, seen, members[0])
        found.update(_sweep(modifier, members, working, args, dtype, packs, factors[identity], seen))
    return found


def _rtn(
    name: str,
    tokens: int,
    working: Working,
    modules: Mapping[str, PlannedModule],
    scale_dtypes: Mapping[str, torch.dtype],
    packs: Mapping[str, bool],
) -> Outcome:
    quantized = quantize_weight(
        name, working.weight(name), modules[name].scheme.weights, scale_dtype=scale_dtypes[name], pack=packs[name]
    )
    return Outcome(quantized, "rtn (few tokens)", tokens)


def _with_all_tokens(name: str, seen: Statistics, working: Working) -> Statistics:
    """What the expert saw together with what all experts of its layer saw; nothing twice for a borrowed one."""
    merged = merged_experts(name, working.statistics) if seen.count else seen
    found = merged.copy()
    found.count = seen.count
    return found


@dataclass(frozen=True)
class Factor:
    """`u` of the Gram matrix in the order `order` of columns (None: as they are)."""

    u: Tensor
    order: Tensor | None
    dampening: float
    dead: int


def factor(modifier: GPTQModifier, seen: Statistics, name: str) -> Factor:
    """The factor of one input's Gram matrix; CalibrationError if no dampening makes it positive definite."""
    assert seen.gram is not None
    gram = seen.gram
    order = None
    if modifier.actorder is not None:
        order = torch.argsort(gram.diagonal(), descending=True, stable=True)
        gram = gram[order][:, order]
    try:
        u, dead, used = ops.factor_with_retry(gram, modifier.dampening_frac)
    except RuntimeError as error:
        raise CalibrationError(
            f"{name}: the Gram matrix of its input is not positive definite, whatever the dampening ({error}); give "
            "more or more varied calibration data, or quantize this layer with QuantizationModifier"
        ) from None
    return Factor(u, order, used, int(dead.sum()))


def _sweep(
    modifier: GPTQModifier,
    members: list[str],
    working: Working,
    args: QuantizationArgs,
    scale_dtype: torch.dtype,
    packs: Mapping[str, bool],
    factored: Factor,
    seen: Statistics,
) -> dict[str, Outcome]:
    """Readers of one input as one matrix, cut apart again."""
    weights = [working.weight(name) for name in members]
    weight = torch.cat(weights).float() if len(weights) > 1 else weights[0].float()
    rows, cols = weight.shape
    size = args.group_size or -1
    order, group_of = factored.order, None
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    static = order is not None and modifier.actorder == "weight"
    if static or args.strategy != "group":
        importance = seen.gram.diagonal() if seen.gram is not None else None
        per_row = args if args.strategy == "group" else _per_channel(args)
        scale, zero_point = weight_scale(members[0], weight, per_row, scale_dtype=scale_dtype, importance=importance)
        if args.strategy == "tensor":
            scale = scale.amax().expand(rows, 1).contiguous()
    if order is not None:
        weight = weight[:, order]
        if scale is not None:
            width = cols if size == -1 else size
            group_of = (order // width).to(torch.int32)
    q_min, q_max = args.q_range
    codes, scale, zero, loss = ops.gptq_sweep(
        weight,
        factored.u,
        q_min=q_min,
        q_max=q_max,
        group_size=size,
        scale=scale,
        zero_point=zero_point,
        symmetric=args.symmetric,
        divisor=args.divisor,
        scale_dtype=scale_dtype,
        g_idx=group_of,
    )
    g_idx = None
    if order is not None:
        codes = torch.empty_like(codes).index_copy_(1, order, codes)
        if modifier.actorder == "group" and args.strategy == "group":
            places = torch.arange(cols, dtype=torch.int32) // size
            g_idx = torch.empty_like(places).index_copy_(0, order, places)
    found: dict[str, Outcome] = {}
    begin = 0
    for name, part in zip(members, weights, strict=True):
        end = begin + part.shape[0]
        part_codes = codes[begin:end]
        packed = ops.pack_int32(part_codes, args.num_bits) if packs[name] else part_codes
        part_scale = scale[begin : begin + 1] if args.strategy == "tensor" else scale[begin:end]
        quantized = QuantizedTensor(
            packed,
            part_scale,
            None if args.symmetric else zero[begin:end],
            args,
            part.shape[0],
            cols,
            packs[name],
            **({} if g_idx is None else {"g_idx": g_idx}),
        )
        total = 2.0 * float(loss[begin:end].double().sum())
        power = energy(part, seen)
        found[name] = Outcome(
            quantized,
            "gptq",
            seen.count,
            loss=total / (max(1, seen.count) * part.shape[0]),
            relative=total / power if power > 0 else None,
            dampening=factored.dampening,
            dead=factored.dead,
        )
        begin = end
    return found


def _per_channel(args: QuantizationArgs) -> QuantizationArgs:
    """The same with a scale for each row."""
    return replace(args, strategy="channel")


def energy(weight: Tensor, seen: Statistics) -> float:
    """tr(W G W^T), the squared output over all tokens, estimated from evenly spaced rows."""
    assert seen.gram is not None
    sample = weight[:: max(1, weight.shape[0] // SAMPLE_ROWS)].float()
    return float((sample @ seen.gram).mul_(sample).sum(dtype=torch.float64)) * weight.shape[0] / sample.shape[0]
