"""pack_w4a8 and w4a8_gemm: bit for bit the reference's, which is checked against exact integers and fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import quantkit.ops as ops

from .cpu_cases import FLOATS, call, check, check_compiles, check_refused, reference

# M, N, K, group: rows around the height of a tile, columns around a panel's 64, groups that begin within a word of
# eight codes, rows that end within one, blocks of 512 columns.
SHAPES = (
    (1, 1, 4, 4),
    (1, 64, 64, -1),
    (2, 65, 33, -1),
    (3, 70, 60, 12),
    (5, 130, 36, 36),
    (6, 63, 256, 32),
    (7, 128, 640, 128),
    (9, 5, 1088, 64),
    (13, 100, 1020, 340),
    (25, 66, 1400, -1),
    (40, 64, 520, 40),
)


def layer(n: int, k: int, group: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed + n * 1000 + k)
    groups = 1 if group == -1 else k // group
    return {
        "codes": torch.randint(-8, 8, (n, k), generator=generator, dtype=torch.int8),
        "scale": torch.randn(n, groups, generator=generator) * 0.02,  # some negative
        "zero": torch.randint(-8, 8, (n, groups), generator=generator, dtype=torch.int8),
        "bias": torch.randn(n, generator=generator),
    }


def packed(parts: dict[str, Tensor]) -> Tensor:
    return ops.pack_w4a8(ops.pack_int32(parts["codes"], 4), parts["codes"].shape[1])


def tokens(m: int, k: int, dtype: torch.dtype) -> Tensor:
    """Rows apart, their beginning off any alignment; one all zero, one with equal extremes."""
    x = torch.randn(m, k + 3, generator=torch.Generator().manual_seed(m + k)) * 3
    x[m // 2] = 0.0
    x[-1, 1::2] = -x[-1].abs().max()
    return x.to(dtype)[:, 1 : k + 1]


@pytest.mark.parametrize(("m", "n", "k", "group"), SHAPES)
def test_reference_is_exact(m: int, n: int, k: int, group: int) -> None:
    """The reference against codes of its own: exact integer sums, then the roundings that it promises."""
    parts, x = layer(n, k, group), tokens(m, k, torch.float32)
    a, input_scale, _ = ops.int8_quant_per_token(x)
    size = k if group == -1 else group
    weight = parts["codes"].long() - parts["zero"].long().repeat_interleave(size, 1)
    sums = (a.long().view(m, 1, -1, size) * weight.view(1, n, -1, size)).sum(-1)
    y = torch.zeros(m, n)
    for g in range(sums.shape[2]):
        y = y + sums[:, :, g].float() * parts["scale"][:, g]
    y = y * input_scale + parts["bias"]
    args = (x, packed(parts), parts["scale"], n, group, parts["zero"], parts["bias"])
    assert torch.equal(reference("w4a8_gemm", *args), y)
    # Far from the exact product only by the roundings of y: one each of product and sum a group, scaling and bias.
    exact = (a.double() * input_scale.double()) @ (
        weight.double() * parts["scale"].double().repeat_interleave(size, 1)
    ).T
    sizes = (sums.abs().double() * parts["scale"].abs().double()).sum(-1) * input_scale.double()
    steps = (2 * sums.shape[2] + 3) * 2.0**-24
    assert ((y.double() - exact - parts["bias"]).abs() <= steps * (sizes + parts["bias"].abs())).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("m", "n", "k", "group"), SHAPES)
def test_like_the_reference(m: int, n: int, k: int, group: int, dtype: torch.dtype) -> None:
    parts, x = layer(n, k, group), tokens(m, k, dtype)
    words, scale, zero = packed(parts), parts["scale"], parts["zero"]
    check("w4a8_gemm", x, words, scale, n, group, None, None)
    check("w4a8_gemm", x, words, scale, n, group, zero, parts["bias"])
    check("w4a8_gemm", x, words, scale.to(dtype), n, group, None, parts["bias"].to(dtype))
    panels = (ops.pack_w4a8_scales(scale), ops.pack_w4a8_scales(zero))
    check("w4a8_gemm", x.contiguous(), words, panels[0], n, group, panels[1], parts["bias"])
    assert torch.equal(
        ops.w4a8_gemm(x, words, panels[0], n, group, weight_zero_point=panels[1]),
        ops.w4a8_gemm(x, words, scale, n, group, weight_zero_point=zero),
    )


@pytest.mark.parametrize(("n", "k"), [(1, 1), (64, 8), (65, 33), (130, 300), (0, 16), (5, 0)])
def test_packing(n: int, k: int) -> None:
    parts = layer(n, k, -1)
    words = ops.pack_int32(parts["codes"], 4)
    wide = torch.randint(-(2**31), 2**31 - 1, (n, words.shape[1] + 3), dtype=torch.int32)
    wide[:, 2:-1] = words
    for source in (words, wide[:, 2:-1]):
        check("pack_w4a8", source, k)
    result = ops.pack_w4a8(words, k)
    for i, j in ((0, 0), (n // 2, k // 2), (n - 1, k - 1)):
        if n and k:
            word = int(result[i // 64, j // 8, i % 64])
            assert (word >> (j % 4 * 8 + j % 8 // 4 * 4) & 15) - 8 == parts["codes"][i, j]


@pytest.mark.parametrize("sign", [1, -1])
def test_extremes_of_sums(sign: int) -> None:
    """The largest sums that there are, of groups of 8 and of the longest group, with zero points far out."""
    k, n = ops.w4a8.MAX_GROUP // 8 * 8, 65
    x = torch.full((1, k), float(sign))
    words = ops.pack_int32(torch.full((n, k), 7, dtype=torch.int8), 4)
    for group in (-1, 8):
        groups = 1 if group == -1 else k // group
        zero = torch.full((n, groups), -128, dtype=torch.int8)
        check("w4a8_gemm", x, ops.pack_w4a8(words, k), torch.ones(n, groups), n, group, zero, None)
    exact = ops.w4a8_gemm(
        x, ops.pack_w4a8(words, k), torch.ones(n, 1), n, -1, weight_zero_point=zero[:, :1].contiguous()
    )
    total = torch.tensor(float(sign * k * 127 * 135)) * ops.int8_quant_per_token(x)[1]
    assert torch.equal(exact, total.expand(1, n))


@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_and_infinity_stay_in_their_rows(dtype: torch.dtype) -> None:
    parts, x = layer(70, 64, 32), torch.randn(9, 64)
    x[2, 5], x[4, 63], x[7, 0] = float("nan"), float("inf"), -float("inf")
    args = (x.to(dtype), packed(parts), parts["scale"], 70, 32, parts["zero"], None)
    check("w4a8_gemm", *args)
    assert call("w4a8_gemm", *args).isnan().all(1).nonzero().flatten().tolist() == [2, 4, 7]
    assert not call("w4a8_gemm", *args)[[0, 1, 3, 5, 6, 8]].isnan().any()


def test_zero_rows_and_empty_extents() -> None:
    parts = layer(70, 64, 32)
    result = ops.w4a8_gemm(torch.zeros(3, 64), packed(parts), parts["scale"], 70, 32, bias=parts["bias"])
    assert torch.equal(result, parts["bias"].expand(3, 70))
    for m, n, k in ((0, 70, 64), (3, 0, 64), (3, 70, 0), (0, 0, 0)):
        parts = layer(n, k, -1)
        groups = 1 if k else 0
        check("w4a8_gemm", torch.randn(m, k), packed(parts), torch.ones(n, groups), n, -1, None, parts["bias"])


def test_rows_and_threads_leave_no_trace() -> None:
    """A row's result does not depend on what else is in the call, nor on the threads."""
    parts, x = layer(200, 576, 64), torch.randn(500, 576).bfloat16()
    args = (packed(parts), ops.pack_w4a8_scales(parts["scale"]), 200, 64, None, None)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(call("w4a8_gemm", x, *args))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    for begin, end in ((0, 1), (7, 9), (100, 113), (499, 500)):
        assert torch.equal(call("w4a8_gemm", x[begin:end], *args), results[0][begin:end])


def test_compiles() -> None:
    parts, x = layer(70, 64, 32), torch.randn(3, 64)
    check_compiles("pack_w4a8", ops.pack_int32(parts["codes"], 4), 64)
    check_compiles("w4a8_gemm", x, packed(parts), parts["scale"], 70, 32, parts["zero"], parts["bias"])
    check_compiles("w4a8_gemm", x, packed(parts), ops.pack_w4a8_scales(parts["scale"]), 70, 32, None, None)


def test_bad_arguments_are_refused() -> None:
    parts, x = layer(70, 64, 32), torch.randn(3, 64)
    good: dict[str, Any] = {
        "x": x,
        "packed": packed(parts),
        "weight_scale": parts["scale"],
        "out_features": 70,
        "group_size": 32,
        "weight_zero_point": parts["zero"],
        "bias": parts["bias"],
    }
    scales, zero = parts["scale"], parts["zero"]
    bad: tuple[tuple[str, Any, str], ...] = (
        ("x", x[0], "x must be 2-D"),
        ("x", x.double(), "x must be float32, float16 or bfloat16"),
        ("packed", good["packed"][:, :7], r"packed must be what pack_w4a8 makes of 70 rows of 64 codes"),
        ("packed", good["packed"].short(), "packed must be what pack_w4a8 makes"),
        ("packed", good["packed"].transpose(0, 1).contiguous().transpose(0, 1), "packed must be contiguous"),
        ("out_features", -1, "out_features must not be negative, got -1"),
        ("group_size", 24, "group_size must be -1 .* divides K = 64, got 24"),
        ("group_size", 2, "group_size must be .* a multiple of 4"),
        ("group_size", 0, "group_size must be"),
        ("group_size", -2, "group_size must be"),
        ("group_size", 16, r"weight_scale must be \[N, G\] = \[70, 4\] .* \[2, 4, 64\], got \[70, 2\]"),
        ("weight_scale", scales.double(), "weight_scale must be float32"),
        ("weight_scale", scales.T.contiguous().T, "weight_scale must be contiguous"),
        ("weight_zero_point", zero.float(), "weight_zero_point must be torch.int8"),
        ("weight_zero_point", zero[:, :1], "weight_zero_point must be torch.int8 of weight_scale's shape"),
        ("weight_zero_point", ops.pack_w4a8_scales(zero), "weight_zero_point must be torch.int8 of weight_scale's"),
        ("weight_zero_point", zero.T.contiguous().T, "weight_zero_point must be contiguous"),
        ("bias", parts["bias"][:69], r"bias must be torch.float32 or x's dtype \[70\]"),
        ("bias", parts["bias"].half(), "bias must be torch.float32 or x's dtype"),
        ("bias", parts["bias"].repeat_interleave(2)[::2], "bias must be contiguous"),
    )
    for name, value, message in bad:
        check_refused("w4a8_gemm", message, *{**good, name: value}.values())
    k = (ops.w4a8.MAX_GROUP + 8) // 8 * 8
    check_refused("w4a8_gemm", "a group must be at most 125254", torch.zeros(0, k), torch.zeros(0, k // 8, 64).int(),
                  torch.zeros(0, 1), 0, -1, None, None)  # fmt: skip
    check_refused("pack_w4a8", "words must be torch.int32", torch.zeros(3, 4), 32)
    check_refused("pack_w4a8", "in_features 33 takes 5 words a row, words has 4", torch.zeros(3, 4).int(), 33)
    with pytest.raises(RuntimeError, match="last dimension contiguous"):
        call("w4a8_gemm", *{**good, "x": x.T.contiguous().T}.values())
    with pytest.raises(RuntimeError, match="values must be 2-D"):
        ops.pack_w4a8_scales(scales[0])
