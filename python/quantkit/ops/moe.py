"""Linears of experts: one call multiplies every token by its expert's quantized weight.

Rows of x are sorted by expert: rows offsets[e] to offsets[e + 1] are expert e's, as `sort_by_expert` puts them. There
is no padding, and an expert without rows costs nothing. Packed weights, scales, zero points and biases are those of the
single Linears (ops.w8a8, ops.w4a8, ops.wna16, ops.fp8_gemm), stacked along a new first dimension of E experts. The rows
of an expert are what the single op makes of them:

    result[offsets[e] : offsets[e + 1]] = gemm(x[offsets[e] : offsets[e + 1]], packed[e], ...)
    with row_scale:  result[m] = fp32(result[m]) * row_scale[m], rounded to x's dtype once more

x that is quantized by tensor at run time gets a scale for each expert. The number of threads changes nothing.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from ._library import check_float, declare

# Arguments that have an expert's part along their first dimension, and of them those that are a number an expert.
_STACKED = frozenset({"packed", "weight_scale", "weight_zero_point", "perm", "bias", "input_scale", "input_zero_point"})
_NUMBERS = frozenset({"input_scale", "input_zero_point"})


def _check(op: str, values: dict[str, Any]) -> None:
    x, offsets, row_scale = values["x"], values["offsets"], values["row_scale"]
    torch._check(x.dim() == 2, lambda: f"quantkit::{op}: x must be 2-D [M, K], got {x.dim()}-D")
    check_float(op, "x", x)
    torch._check(
        offsets.dim() == 1 and offsets.shape[0] >= 1 and offsets.dtype in (torch.int32, torch.int64),
        lambda: (
            f"quantkit::{op}: offsets must be torch.int64 or torch.int32 [experts + 1], "
            f"got {offsets.dtype} {list(offsets.shape)}"
        ),
    )
    experts = offsets.shape[0] - 1
    for name in values.keys() & _STACKED:
        stack = values[name]
        if stack is not None:
            torch._check(
                stack.dim() >= 1 and stack.shape[0] == experts and stack.is_contiguous(),
                lambda name=name, stack=stack: (
                    f"quantkit::{op}: {name} must be contiguous, one for each of {experts} experts (offsets), "
                    f"got {list(stack.shape)}"
                ),
            )
    if row_scale is not None:
        torch._check(
            row_scale.dtype == torch.float32 and tuple(row_scale.shape) == (x.shape[0],) and row_scale.is_contiguous(),
            lambda: (
                f"quantkit::{op}: row_scale must be contiguous torch.float32 [{x.shape[0]}], "
                f"got {row_scale.dtype} {list(row_scale.shape)}"
            ),
        )


def _define(kind: str, how: str) -> torch._ops.OpOverload:
    """The op over experts of `kind`_gemm; `how` are its arguments but those that all kinds have."""
    op, single = f"moe_{kind}_gemm", f"{kind}_gemm"

    def bind(args: tuple[Any, ...]) -> dict[str, Any]:
        known = getattr(torch.ops.quantkit, op).default._schema.arguments
        return {a.name: args[i] if i < len(args) else a.default_value for i, a in enumerate(known)}

    def fake(*args: Any) -> Tensor:
        values = bind(args)
        _check(op, values)
        y: Tensor = values["x"].new_empty((values["x"].shape[0], values["out_features"]))
        return y

    def reference(*args: Any) -> Tensor:
        y, values = fake(*args), bind(args)
        x, row_scale, bounds = values.pop("x"), values.pop("row_scale"), values.pop("offsets").tolist()
        torch._check(
            bounds[0] == 0 and bounds[-1] == len(x) and all(a <= b for a, b in itertools.pairwise(bounds)),
            lambda: f"quantkit::{op}: offsets must rise from 0 to x's {len(x)} rows, got {bounds}",
        )
        for expert, (begin, end) in enumerate(itertools.pairwise(bounds)):
            if begin == end:
                continue
            own = dict(values)
            for name in values.keys() & _STACKED:
                if values[name] is not None:
                    own[name] = values[name][expert : expert + 1] if name in _NUMBERS else values[name][expert]
            # The op, not its reference: the result is defined by what the single op makes.
            y[begin:end] = getattr(torch.ops.quantkit, single)(x=x[begin:end], **own)
        return y if row_scale is None else (y.float() * row_scale[:, None]).to(x.dtype)

    return declare(
        f"{op}(Tensor x, Tensor offsets, Tensor packed, Tensor weight_scale, int out_features, {how}, "
        "Tensor? bias=None, Tensor? row_scale=None) -> Tensor",
        fake=fake,
        reference=reference,
    )


_GEMMS = {
    "w8a8": _define("w8a8", "Tensor? input_scale=None, Tensor? input_zero_point=None, bool symmetric=True"),
    "w4a8": _define("w4a8", "int group_size, Tensor? weight_zero_point=None"),
    "wna16": _define("wna16", "int num_bits, int group_size, Tensor? weight_zero_point=None, Tensor? perm=None"),
    "fp8": _define("fp8", "int[] weight_block, Tensor? input_scale=None, int[]? input_block=None"),
}


def moe_gemm(
    kind: str,
    x: Tensor,
    offsets: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    out_features: int,
    *,
    bias: Tensor | None = None,
    row_scale: Tensor | None = None,
    **how: Any,
) -> Tensor:
    """The Linears of all experts in one call: x [M, K] (fp32, fp16, bf16), sorted by expert -> [M, N] of x's dtype.

    kind: "w8a8", "w4a8", "wna16" or "fp8". offsets int64 or int32 [E + 1]: rows offsets[e] to offsets[e + 1] of x are
    expert e's (`sort_by_expert`); on CUDA they are taken on trust, the host does not wait for them. packed [E, ...]:
    the experts' `pack_w8a8`, `pack_w4a8`, `pack_wna16` or `pack_fp8`, stacked; weight_scale [E, ...] and bias [E, N]
    likewise. row_scale fp32 [M] multiplies the rows of the result.

    `how` is what the single op takes besides, with tensors of weights stacked:
      w8a8    input_scale fp32 [E], input_zero_point int8 [E], symmetric
      w4a8    group_size, weight_zero_point int8 [E, N, G]; both this and the scales may be `pack_w4a8_scales`, stacked
      wna16   num_bits, group_size, weight_zero_point int8 [E, N, G], perm int32 [E, K]; scales and zero points may be
              `pack_wna16_scales`, stacked
      fp8     weight_block, input_scale fp32 [E], input_block

    Errors: ValueError for another kind; RuntimeError naming the argument, its value and what it must be.
    """
    if kind not in _GEMMS:
        raise ValueError(f"moe_gemm: no such kind: {kind!r}; there are {', '.join(map(repr, _GEMMS))}")
    y: Tensor = _GEMMS[kind](x, offsets, packed, weight_scale, out_features, bias=bias, row_scale=row_scale, **how)
    return y


def sort_by_expert(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Which rows each expert gets, from the router's choice: experts int32 or int64 [T, k], k experts for each token.

    Gives `order` int64 [T * k], the places (token * k + choice) sorted by expert, in rising order within one (stable),
    and `offsets` int64 [E + 1], where in it each expert begins. The rows to multiply are x[order // k].
    """
    chosen, order = torch.sort(experts.flatten(), stable=True)
    bounds = torch.arange(num_experts + 1, dtype=chosen.dtype, device=chosen.device)
    return order, torch.searchsorted(chosen, bounds)


def combine_experts(y: Tensor, order: Tensor, experts_per_token: int, weights: Tensor | None = None) -> Tensor:
    """The sum over a token's experts: y [T * k, N] in the order of `sort_by_expert` -> [T, N] of y's dtype.

    weights: the router's, fp32, fp16 or bf16 [T, k]; None for a plain sum. Products and sums are fp32, in the order of
    a token's choices, and rounded once.
    """
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), dtype=order.dtype, device=order.device)
    places = places.view(-1, experts_per_token)
    total = torch.zeros((places.shape[0], y.shape[1]), dtype=torch.float32, device=y.device)
    for choice in range(experts_per_token):
        rows = y[places[:, choice]].float()
        total += rows if weights is None else rows * weights[:, choice, None].float()
    return total.to(y.dtype)
