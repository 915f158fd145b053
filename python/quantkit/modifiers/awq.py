"""AWQ (Lin et al., 2023): the smoothing vector that changes the quantized layer's output least, found on a grid.

The loss needs no forward: with G = x^T x and dW = Q(W s) / s - W, the change of the output is tr(dW G dW^T).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .. import ops
from ..calibration.statistics import Statistics
from ..config.recipe import AWQModifier
from ..config.schemes import QuantizationArgs
from ..distributed import ONE, Ranks
from ..models.mappings import Smoothing
from ..plan import PlannedModule
from .rtn import quantize_weight
from .working import Working, narrowed, widened

MINIMUM = 1e-4
# Rows of each weight that all candidates are tried on, and how many of them are then tried on all rows.
SAMPLE_ROWS, FINALISTS = 256, 3


def search(
    modifier: AWQModifier,
    place: Smoothing,
    working: Working,
    modules: Mapping[str, PlannedModule],
    ranks: Ranks = ONE,
) -> tuple[Tensor, float, float]:
    """s (fp32 [channels of the smooth layer]) of the best candidate for one place, its loss and that of no smoothing
    at all. Readers that are not quantized to integers have no say. Of several `ranks` each tries some candidates.
    """
    readers = [m for m in place.balance if m in modules and modules[m].scheme.weights.type == "int"]
    inputs = working.inputs_of(readers)
    if not inputs:
        return torch.ones(working.weight(place.smooth).shape[0]), 0.0, 0.0
    mean = sum(seen.absum for seen, _ in inputs.values() if seen.absum is not None)
    assert isinstance(mean, Tensor)
    mean = mean / max(1, sum(seen.count for seen, _ in inputs.values()))
    weight_mean = narrowed(_weight_mean(readers, working, modules), place)
    narrow = grid(narrowed(mean, place), weight_mean, modifier)
    candidates = torch.stack([widened(s, place) for s in narrow])
    if modifier.loss == "parent":
        losses = _parent_losses(candidates, readers, working, modules, ranks)
    else:
        losses = _gram_search(candidates, inputs.values(), working, modules, ranks)
    losses = losses.nan_to_num(nan=torch.inf)
    best = int(losses.argmin()) if bool(torch.isfinite(losses).any()) else 0
    return narrow[best], float(losses[best]), float(losses[0])


def _gram_search(
    candidates: Tensor,
    inputs: Iterable[tuple[Statistics, list[str]]],
    working: Working,
    modules: Mapping[str, PlannedModule],
    ranks: Ranks,
) -> Tensor:
    """The loss of each candidate; infinite for those that some rows of each weight put behind the best few. Rows add up
    to the loss and are much alike, so a sample of them tells which candidates are worth all of them.
    """
    parts = [
        (torch.cat([working.weight(m) for m in members]), seen, args)
        for seen, names in inputs
        for args, members in _by_args(names, modules).items()
    ]

    def total(everyone: Tensor, sampled: bool) -> Tensor:
        some = everyone[ranks.rank :: ranks.world].contiguous()
        losses = torch.zeros(len(some))
        for weight, seen, args in parts:
            assert seen.gram is not None
            rows = weight[:: max(1, weight.shape[0] // SAMPLE_ROWS)] if sampled else weight
            losses += gram_losses(rows, seen.gram, some, args)[:, 0] * (weight.shape[0] / rows.shape[0])
        found = torch.empty(len(everyone))
        for rank, theirs in enumerate(ranks.gather(losses)):
            found[rank :: ranks.world] = theirs
        return found.nan_to_num(nan=torch.inf)

    if all(weight.shape[0] <= 2 * SAMPLE_ROWS for weight, _, _ in parts):
        return total(candidates, sampled=False)
    first = total(candidates, sampled=True)
    finalists = torch.cat((torch.zeros(1, dtype=torch.int64), first[1:].argsort(stable=True)[:FINALISTS] + 1))
    losses = torch.full((len(candidates),), torch.inf)
    losses[finalists] = total(candidates[finalists], sampled=False)
    return losses


def grid(mean: Tensor, weight: Tensor, modifier: AWQModifier) -> Tensor:
    """Candidates [n, channels], the first of which is 1. `mean`: mean |x| per channel; `weight`: mean of |w| over its
    group's largest. With duo scaling s = mean^r / weight^(1 - r), else mean^r; each is centred on 1.
    """
    n = modifier.n_grid
    kinds = {True: (True,), False: (False,), "both": (False, True)}[modifier.duo_scaling]
    found = [torch.ones_like(mean)]
    for duo in kinds:
        steps = max(2, n // len(kinds))
        for i in range(steps):
            ratio = i / (steps - 1)
            s = mean.pow(ratio)
            s = s / (weight.pow(1 - ratio) + MINIMUM) if duo else s
            s = s.clamp(min=MINIMUM)
            s = s / (s.max() * s.min()).sqrt()
            # A channel that is always zero, or beyond fp32's range, is left alone.
            found.append(torch.where(torch.isfinite(s) & (s > 0) & (mean > 0), s, torch.ones_like(s)))
    return torch.stack(found)


def gram_losses(weight: Tensor, gram: Tensor, candidates: Tensor, args: QuantizationArgs) -> Tensor:
    """tr(dW G dW^T) [candidates, 1]; not finite counts as infinite."""
    q_min, q_max = args.q_range
    return ops.awq_search(
        weight,
        gram,
        candidates,
        group_size=args.group_size or -1,
        q_min=q_min,
        q_max=q_max,
        symmetric=args.symmetric,
        divisor=args.divisor,
    )


def _weight_mean(readers: list[str], working: Working, modules: Mapping[str, PlannedModule]) -> Tensor:
    """Mean over all readers' rows of |w| as a share of its group's largest: fp32 [channels]."""
    total, rows = None, 0
    for module in readers:
        weight = working.weight(module).abs().float()
        size = modules[module].scheme.weights.group_size or weight.shape[1]
        groups = weight.view(weight.shape[0], -1, size)
        share = (groups / (groups.amax(-1, keepdim=True) + 1e-6)).flatten(1).sum(0)
        total = share if total is None else total + share
        rows += weight.shape[0]
    assert total is not None
    return total / rows


def _by_args(names: list[str], modules: Mapping[str, PlannedModule]) -> dict[QuantizationArgs, list[str]]:
    found: dict[QuantizationArgs, list[str]] = {}
    for name in names:
        found.setdefault(modules[name].scheme.weights, []).append(name)
    return found


def _parent_losses(
    candidates: Tensor, readers: list[str], working: Working, modules: Mapping[str, PlannedModule], ranks: Ranks
) -> Tensor:
    """Squared change of the whole layer's output over all batches, for each candidate, by running it."""
    layer = working.layer
    assert layer.outputs is not None
    working.settle()
    saved = {m: layer.tensor(f"{m}.weight") for m in readers}
    masters = {m: working.weight(m).float() for m in readers}
    reference = list(layer.outputs())
    each: list[list[Tensor]] = []  # of this rank's batches
    for s in candidates:
        for module, master in masters.items():
            args = modules[module].scheme.weights
            quantized = quantize_weight(module, master * s, args, scale_dtype=torch.float32, pack=False)
            layer.put(f"{module}.weight", (quantized.dequantize() / s).to(saved[module].dtype))
        each.append(
            [
                (out.float() - wanted.float()).square().sum()
                for out, wanted in zip(layer.outputs(), reference, strict=True)
            ]
        )
    for module, weight in saved.items():
        layer.put(f"{module}.weight", weight)
    losses = torch.zeros(len(candidates))
    for theirs in ranks.gather(each):  # in the order of all batches
        for i, found in enumerate(theirs):
            for loss in found:
                losses[i] += loss
    return losses
