"""moe_gemm against a loop of the single ops; the sorting of tokens and the way back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import quantkit.ops as ops

from .cpu_cases import FLOATS, check_refused

E4M3 = torch.float8_e4m3fn
COUNTS = (3, 0, 1, 17, 0, 5, 2, 0)  # rows of each expert
EXPERTS, N, K = len(COUNTS), 70, 256
CASES = (
    "w8a8",
    "w8a8 static",
    "w8a8 asymmetric",
    "w4a8",
    "w4a8 zero",
    "w4a16",
    "w4a16 zero perm",
    "w4a16 zero panels",
    "w8a16",
    "fp8 channel",
    "fp8 token",
    "fp8 block",
    "fp8 static",
    "fp8 tensor",
)


def offsets(counts: tuple[int, ...] = COUNTS, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0).to(dtype)


def experts(case: str) -> dict[str, Any]:
    """The arguments of the op over experts, but x, offsets, bias and row_scale."""
    generator = torch.Generator().manual_seed(len(case))
    kind, *how = case.split()

    def numbers(*shape: int) -> Tensor:
        return torch.rand(EXPERTS, *shape, generator=generator) * 0.02 + 0.001

    def codes(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, (EXPERTS, *shape), dtype=torch.int8, generator=generator)

    if kind == "w8a8":
        weight = codes(-127, 128, N, K)
        values: dict[str, Any] = {"packed": [ops.pack_w8a8(w) for w in weight], "weight_scale": numbers(N)}
        if "static" in how:
            values |= {"input_scale": numbers(), "input_zero_point": codes(-9, 9)}
        if "asymmetric" in how:
            values["symmetric"] = False
    elif kind == "w4a8":
        weight = [ops.pack_int32(w, 4) for w in codes(-8, 8, N, K)]
        values = {"packed": [ops.pack_w4a8(w, K) for w in weight], "weight_scale": numbers(N, 2), "group_size": 128}
        if "zero" in how:
            values["weight_zero_point"] = codes(-8, 8, N, 2)
    elif kind in ("w4a16", "w8a16"):
        bits = int(kind[1])
        weight = [ops.pack_int32(w, bits) for w in codes(-(1 << bits - 1), 1 << bits - 1, N, K)]
        perm = torch.stack([torch.randperm(K, generator=generator).int() for _ in weight]) if "perm" in how else None
        values = {"weight_scale": numbers(N, 4), "num_bits": bits, "group_size": 64, "perm": perm}
        values["packed"] = [ops.pack_wna16(w, bits, K, None if perm is None else perm[e]) for e, w in enumerate(weight)]
        if "zero" in how:
            values["weight_zero_point"] = codes(-8, 8, N, 4)
        for name in ("weight_scale", "weight_zero_point") if "panels" in how else ():
            values[name] = torch.stack([ops.pack_wna16_scales(v) for v in values[name]])
    else:
        weight = (torch.randn(EXPERTS, N, K, generator=generator) * 20).to(E4M3)
        values = {"packed": [ops.pack_fp8(w) for w in weight], "weight_block": [1, -1], "weight_scale": numbers(N, 1)}
        if "block" in how:
            values |= {"weight_block": [128, 128], "weight_scale": numbers(1, 2), "input_block": [1, 128]}
        if "token" in how:
            values["input_block"] = [1, -1]
        if "tensor" in how:
            values["input_block"] = [-1, -1]
        if "static" in how:
            values["input_scale"] = numbers()
    values["packed"] = torch.stack(values["packed"])
    return values


def op_of(case: str) -> str:
    kind = case.split()[0]
    return "wna16" if kind in ("w4a16", "w8a16") else kind


def run(case: str, x: Tensor, rows: Tensor, values: dict[str, Any], **more: Any) -> Tensor:
    how = {k: v for k, v in values.items() if k not in ("packed", "weight_scale")}
    return ops.moe_gemm(op_of(case), x, rows, values["packed"], values["weight_scale"], N, **how, **more)


def singles(case: str, x: Tensor, counts: tuple[int, ...], values: dict[str, Any], bias: Tensor | None) -> Tensor:
    """The single op, an expert at a time."""
    parts, begin = [], 0
    for e, count in enumerate(counts):
        own = {k: v[e] if isinstance(v, Tensor) else v for k, v in values.items()}
        for name in ("input_scale", "input_zero_point"):
            if name in own:
                own[name] = own[name].reshape(1)
        packed, scale = own.pop("packed"), own.pop("weight_scale")
        if bias is not None:
            own["bias"] = bias[e]
        rows = x[begin : begin + count]
        if op_of(case) == "w8a8":
            parts.append(ops.w8a8_gemm(rows, packed, scale, N, **own))
        elif op_of(case) == "w4a8":
            parts.append(ops.w4a8_gemm(rows, packed, scale, N, own.pop("group_size"), **own))
        elif op_of(case) == "wna16":
            bits, size = own.pop("num_bits"), own.pop("group_size")
            parts.append(ops.wna16_gemm(rows, packed, scale, bits, N, size, **own))
        else:
            parts.append(ops.fp8_gemm(rows, packed, scale, own.pop("weight_block"), N, **own))
        begin += count
    return torch.cat(parts)


@pytest.mark.parametrize("case", CASES)
def test_like_the_single_ops(case: str) -> None:
    values = experts(case)
    for dtype in FLOATS:
        wide = torch.randn(sum(COUNTS), K + 5, generator=torch.Generator().manual_seed(3)).to(dtype)
        x, bias = wide[:, 1 : K + 1], torch.randn(EXPERTS, N).to(dtype)
        for b in (None, bias, bias.float()):
            expected = singles(case, x, COUNTS, values, b)
            y = run(case, x, offsets(), values, bias=b)
            assert torch.equal(y, expected)
            scale = torch.rand(len(x))
            scaled = run(case, x, offsets(dtype=torch.int32), values, bias=b, row_scale=scale)
            assert torch.equal(scaled, (expected.float() * scale[:, None]).to(dtype))
        assert run(case, x[:0], offsets((0,) * EXPERTS), values).shape == (0, N)


@pytest.mark.parametrize("case", CASES)
def test_threads_leave_no_trace(case: str) -> None:
    values, x = experts(case), torch.randn(sum(COUNTS), K).bfloat16()
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(run(case, x, offsets(), values))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_many_rows_of_an_expert() -> None:
    """More than a thread takes at a time."""
    counts = (0, 531, 0, 1, 0, 0, 250, 0)
    x = torch.randn(sum(counts), K).bfloat16()
    for case in ("w8a8", "w4a8 zero", "w4a16 zero perm", "fp8 block"):
        values, scale = experts(case), torch.rand(len(x))
        y = run(case, x, offsets(counts), values, row_scale=scale)
        expected = singles(case, x, counts, values, None)
        assert torch.equal(y, (expected.float() * scale[:, None]).bfloat16())


def test_no_experts() -> None:
    none = torch.zeros(0, 2, 6400, dtype=torch.int8)
    y = ops.moe_gemm("fp8", torch.zeros(0, 96), offsets(()), none, torch.zeros(0, 70, 1), 70, weight_block=[1, -1])
    assert y.shape == (0, 70)


def test_nan_stays_in_its_row() -> None:
    for case in CASES:
        if case == "fp8 tensor":  # one scale for the rows of an expert
            continue
        values, x = experts(case), torch.randn(sum(COUNTS), K)
        x[5, 100] = float("nan")
        y = run(case, x, offsets(), values)
        assert y[5].isnan().all()
        assert y.isnan().any(1).sum() == 1


def test_refuses() -> None:
    values = experts("fp8 token")
    x, packed, scale = torch.randn(sum(COUNTS), K), values["packed"], values["weight_scale"]
    arguments = [x, offsets(), packed, scale, N, [1, -1], None, [1, -1], None, None]

    def refused(message: str, place: int, value: Any) -> None:
        check_refused("moe_fp8_gemm", message, *arguments[:place], value, *arguments[place + 1 :])

    refused("x must be 2-D", 0, x[0])
    refused("x must be float32, float16 or bfloat16", 0, x.int())
    refused(r"offsets must rise from 0 to x's 28 rows, got \[0, 3, 3, 4", 1, offsets() - offsets().eq(28).long())
    refused("offsets must rise from 0 to x's 28 rows", 1, offsets((3, -2, 3, 17, 0, 5, 2, 0)))
    refused(r"offsets must be torch.int64 or torch.int32 \[experts \+ 1\]", 1, offsets().float())
    refused("packed must be contiguous, one for each of 8 experts", 2, packed[:7])
    refused("weight_scale must be contiguous, one for each of 8 experts", 3, scale[:7])
    refused(r"weight_scale must be contiguous torch.float32 \[70, 1\]", 3, scale[:, :69].contiguous())
    refused("packed must be what pack_fp8 makes", 4, 200)
    refused("bias must be contiguous, one for each of 8 experts", 8, torch.ones(N))
    refused(r"row_scale must be contiguous torch.float32 \[28\]", 9, torch.ones(3))
    with pytest.raises(ValueError, match="no such kind: 'fp4'; there are 'w8a8'"):
        ops.moe_gemm("fp4", x, offsets(), packed, scale, N)


def test_compiles() -> None:
    for case in ("w8a8 static", "w4a8 zero", "w4a16 zero perm", "fp8 block"):
        values, x = experts(case), torch.randn(sum(COUNTS), K)
        overload = getattr(torch.ops.quantkit, f"moe_{op_of(case)}_gemm").default
        how = {k: v for k, v in values.items() if k not in ("packed", "weight_scale")}
        arguments = (x, offsets(), values["packed"], values["weight_scale"], N)
        torch.library.opcheck(overload, arguments, how)
    torch.compiler.reset()
    choices = torch.randint(0, EXPERTS, (9, 2))
    weights = torch.rand(9, 2)

    def layer(tokens: Tensor, choices: Tensor, weights: Tensor) -> Tensor:
        order, rows = ops.sort_by_expert(choices, EXPERTS)
        return ops.combine_experts(run(case, tokens[order // 2], rows, values), order, 2, weights)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x[:9], choices, weights), layer(x[:9], choices, weights))


def test_sort_and_combine() -> None:
    choices = torch.tensor([[2, 0], [0, 3], [2, 3], [3, 2]])
    order, rows = ops.sort_by_expert(choices, 5)
    assert order.tolist() == [1, 2, 0, 4, 7, 3, 5, 6]
    assert rows.tolist() == [0, 2, 2, 5, 8, 8]
    x, weights = torch.randn(4, 33), torch.rand(4, 2)
    factor = torch.arange(1.0, 6.0)  # expert e multiplies by e + 1
    y = x[order // 2] * factor[choices.flatten()[order], None]
    expected = x * (factor[choices] * weights).sum(1, keepdim=True)
    torch.testing.assert_close(ops.combine_experts(y, order, 2, weights), expected)
    torch.testing.assert_close(ops.combine_experts(y, order, 2), x * factor[choices].sum(1, keepdim=True))
    order, rows = ops.sort_by_expert(torch.zeros(0, 2, dtype=torch.int32), 5)
    assert rows.tolist() == [0] * 6
    assert ops.combine_experts(torch.zeros(0, 33), order, 2).shape == (0, 33)
