"""What the CUDA GEMMs are asked, on the host emulation and on a device alike, and what they must answer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import quantkit.ops as ops
from quantkit.ops.fp8_gemm import quantized, unpack_codes

from .cuda_cases import FLOATS, Case, assert_same

# Rows of every kind of tile (16, 32, 64, 128) with and without a rest, columns off the panels, depths off every vector
# and stage; the last ones are split along K.
SHAPES = ((1, 1, 1), (3, 70, 36), (16, 64, 512), (17, 130, 129), (40, 96, 264), (65, 200, 100), (130, 140, 72))
DEEP = ((2, 40, 2112), (20, 64, 4160))
# Depths with groups of 32, 64 and 128; a split of K.
GROUPED = (
    (1, 1, 24),
    (3, 70, 192),
    (16, 64, 256),
    (17, 130, 72),
    (40, 96, 384),
    (65, 200, 128),
    (130, 140, 96),
    (2, 40, 4224),
)

# Exact, bit for bit: sums are integers, and what is done to them has an order.
EXACT = {"int8_gemm", "w8a8_gemm", "w4a8_gemm", "moe_w8a8_gemm", "moe_w4a8_gemm"}
OPS = EXACT | {"int8_mixed_gemm", "wna16_gemm", "bf16_gemm", "fp8_gemm", "moe_wna16_gemm", "moe_fp8_gemm"}


def generator(*seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(sum(s * 1009**i for i, s in enumerate(seed)) % 2**31)


def tokens(rows: int, cols: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Values of several magnitudes; a row of zeros, one with a NaN and one with an infinity where there are many."""
    random = generator(rows, cols, seed)
    x = torch.randn(rows, cols, generator=random) * torch.exp(torch.randn(rows, 1, generator=random))
    if rows > 2:
        x[1] = 0.0
    if rows > 6:
        x[5, cols // 2] = float("nan")
        x[6, cols // 3] = float("inf")
    return x.to(dtype)


def codes(rows: int, cols: int, bits: int = 8) -> Tensor:
    low = -(2 ** (bits - 1))
    return torch.randint(low, -low, (rows, cols), dtype=torch.int8, generator=generator(rows, cols, bits))


def scales(*shape: int) -> Tensor:
    return torch.rand(shape, generator=generator(*shape)) * 0.02 + 1e-3


def narrowed(x: Tensor) -> Tensor:
    """The same values as a part of something wider, off every alignment."""
    return torch.cat([x[:, :1], x, x[:, :2]], 1)[:, 1 : 1 + x.shape[1]]


def offsets_of(rows: int, experts: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Experts with many rows, with one and with none."""
    cuts = torch.randint(0, rows + 1, (experts - 1,), generator=generator(rows, experts)).sort().values
    return torch.cat([torch.tensor([0]), cuts, torch.tensor([rows])]).to(dtype)


def int8_cases(rows: int, cols: int, depth: int) -> Iterator[Case]:
    """(rows, cols, depth) = (M, N, K)."""
    packed, scale = ops.pack_w8a8(codes(cols, depth)), scales(cols)
    a = codes(rows, depth)
    yield "int8_gemm", (a, packed, cols)
    yield "int8_gemm", (narrowed(a), packed, cols)
    bias = torch.randn(cols, generator=generator(cols))
    one, zero = torch.tensor([0.03]), torch.tensor([-7], dtype=torch.int8)
    for dtype in FLOATS:
        x = tokens(rows, depth, dtype)
        yield "w8a8_gemm", (x, packed, scale, cols, None, None, True, None)
        yield "w8a8_gemm", (narrowed(x), packed, scale[:1].clone(), cols, None, None, False, bias.to(dtype))
    x = tokens(rows, depth, torch.bfloat16, 1)
    yield "w8a8_gemm", (x, packed, scale, cols, one, None, True, bias)
    yield "w8a8_gemm", (x, packed, scale, cols, one, zero, False, bias)
    for threshold in (6.0, 0.7, float("inf")):
        yield "int8_mixed_gemm", (x, packed, scale, cols, threshold, bias)


def int8_expert_cases(rows: int, cols: int, depth: int, experts: int) -> Iterator[Case]:
    packed = torch.stack([ops.pack_w8a8(codes(cols, depth).roll(e)) for e in range(experts)])
    scale = scales(experts, cols)
    bias = torch.randn(experts, cols, generator=generator(cols))
    weights = torch.rand(rows, generator=generator(rows))
    each, zero = scales(experts) * 10, torch.arange(experts, dtype=torch.int8) - 3
    for dtype in (torch.int32, torch.int64):
        offsets = offsets_of(rows, experts, dtype)
        x = tokens(rows, depth, torch.bfloat16)
        yield "moe_w8a8_gemm", (x, offsets, packed, scale, cols, None, None, True, None, None)
        yield "moe_w8a8_gemm", (x, offsets, packed, scale[:, :1].clone(), cols, None, None, False, bias, weights)
        yield "moe_w8a8_gemm", (x.half(), offsets, packed, scale, cols, each, zero, False, bias.half(), weights)


def wna16_cases(rows: int, cols: int, depth: int) -> Iterator[Case]:
    for bits, groups in ((4, (32, 128, -1)), (8, (64, -1)), (4, (24, 8))):
        weight = codes(cols, depth, bits)
        words = ops.pack_int32(weight, bits)
        for group in groups:
            if group > 0 and depth % group:
                continue
            count = 1 if group == -1 else depth // group
            scale = scales(cols, count)
            zero = codes(cols, count, bits)
            perm = torch.randperm(depth, generator=generator(depth)).to(torch.int32)
            bias = torch.randn(cols, generator=generator(cols))
            plain, ordered = (ops.pack_wna16(words, bits, depth, p) for p in (None, perm))
            for dtype in FLOATS:
                x = tokens(rows, depth, dtype, group)
                yield "wna16_gemm", (x, plain, scale, None, None, None, bits, cols, group)
                yield "wna16_gemm", (narrowed(x), plain, scale.to(dtype), zero, None, bias, bits, cols, group)
            x = tokens(rows, depth, torch.bfloat16, group)
            yield "wna16_gemm", (x, ordered, scale.half(), zero, perm, bias.bfloat16(), bits, cols, group)
            placed = ops.pack_wna16_scales(scale), ops.pack_wna16_scales(zero)
            yield "wna16_gemm", (x, plain, placed[0], placed[1], None, bias, bits, cols, group)


def bf16_cases(rows: int, cols: int, depth: int) -> Iterator[Case]:
    weight = torch.randn(cols, depth, generator=generator(cols, depth)).bfloat16()
    packed, bias = ops.pack_bf16(weight), torch.randn(cols, generator=generator(cols))
    for dtype in FLOATS:
        x = tokens(rows, depth, dtype)
        yield "bf16_gemm", (x, packed, None, cols)
        yield "bf16_gemm", (narrowed(x), packed, bias.to(dtype), cols)


def w4a8_cases(rows: int, cols: int, depth: int) -> Iterator[Case]:
    packed = ops.pack_w4a8(ops.pack_int32(codes(cols, depth, 4), 4), depth)
    bias = torch.randn(cols, generator=generator(cols))
    for group in (64, 128, -1, 32, 96, 12):
        if group > 0 and depth % group:
            continue
        count = 1 if group == -1 else depth // group
        scale, zero = scales(cols, count), codes(cols, count)
        for dtype in FLOATS:
            x = tokens(rows, depth, dtype, group)
            yield "w4a8_gemm", (x, packed, scale, cols, group, None, None)
            yield "w4a8_gemm", (narrowed(x), packed, scale.to(dtype), cols, group, zero, bias)
        placed = ops.pack_w4a8_scales(scale), ops.pack_w4a8_scales(zero)
        yield "w4a8_gemm", (x, packed, placed[0], cols, group, placed[1], bias.bfloat16())


# Blocks of the weight's scales, and those of x: a number a tensor, a token, groups; None leaves x as it is.
FP8_BLOCKS = (
    ([-1, -1], [-1, -1]),
    ([1, -1], [1, -1]),
    ([128, 128], [1, 128]),
    ([1, -1], None),
    ([128, 128], None),
    ([64, 96], [1, 64]),
    ([3, 40], [1, 24]),
)


def float8_codes(rows: int, cols: int) -> Tensor:
    weight = torch.randn(rows, cols, generator=generator(rows, cols)) * 40
    return weight.to(torch.float8_e4m3fn)


def fp8_cases(rows: int, cols: int, depth: int) -> Iterator[Case]:
    weight = float8_codes(cols, depth)
    if cols > 4:
        weight.view(torch.uint8)[3, depth // 2] = 0xFF
    packed, bias = ops.pack_fp8(weight), torch.randn(cols, generator=generator(cols))
    for i, (block, group) in enumerate(FP8_BLOCKS):
        scale = scales(*ops._library.grid(cols, depth, block))
        x = tokens(rows, depth, FLOATS[i % 3], i)
        yield "fp8_gemm", (x, packed, scale, block, cols, None, group, bias)
        x = tokens(rows, depth, FLOATS[(i + 1) % 3], i)
        yield "fp8_gemm", (narrowed(x), packed, scale, block, cols, None, group, None)
    scale = scales(cols, 1)
    yield "fp8_gemm", (x, packed, scale, [1, -1], cols, torch.tensor([0.02]), None, bias)
    yield "fp8_gemm", (x, packed, scale, [1, -1], cols, torch.tensor([0.02]), [-1, -1], bias)


def expert_cases(rows: int, cols: int, depth: int, experts: int) -> Iterator[Case]:
    """int4, int8 and FP8 weights; depth a multiple of 128."""
    offsets, weights = offsets_of(rows, experts), torch.rand(rows, generator=generator(rows))
    bias = torch.randn(experts, cols, generator=generator(cols))
    x = tokens(rows, depth, torch.bfloat16)
    int4 = [ops.pack_int32(codes(cols, depth, 4).roll(e), 4) for e in range(experts)]
    scale, zero = scales(experts, cols, depth // 64), codes(experts * cols, depth // 64, 4).view(experts, cols, -1)
    packed = torch.stack([ops.pack_w4a8(w, depth) for w in int4])
    yield "moe_w4a8_gemm", (x, offsets, packed, scale, cols, 64, zero, bias, weights)
    placed = (torch.stack([ops.pack_w4a8_scales(t) for t in stack]) for stack in (scale, zero))
    yield "moe_w4a8_gemm", (x.half(), offsets, packed, next(placed), cols, 64, next(placed), bias.half(), None)
    yield "moe_w4a8_gemm", (x, offsets, packed, scale[:, :, :1].clone(), cols, -1, None, None, weights)
    perm = torch.stack([torch.randperm(depth, generator=generator(depth, e)) for e in range(experts)]).to(torch.int32)
    packed = torch.stack([ops.pack_wna16(w, 4, depth, p) for w, p in zip(int4, perm, strict=True)])
    yield "moe_wna16_gemm", (x, offsets, packed, scale, cols, 4, 64, zero, perm, bias, weights)
    yield "moe_wna16_gemm", (x.float(), offsets, packed, scale, cols, 4, 64, None, None, None, None)
    placed = (torch.stack([ops.pack_wna16_scales(t) for t in stack]) for stack in (scale, zero))
    yield "moe_wna16_gemm", (x, offsets, packed, next(placed), cols, 4, 64, next(placed), perm, bias, weights)
    packed = torch.stack([ops.pack_fp8(float8_codes(cols, depth).roll(e, 0)) for e in range(experts)])
    each = scales(experts)
    for block, given, group in (
        ([128, 128], None, [1, 128]),
        ([1, -1], None, [-1, -1]),
        ([1, -1], each, None),
        ([1, -1], None, None),
    ):
        scale = scales(experts, *ops._library.grid(cols, depth, block))
        yield "moe_fp8_gemm", (x, offsets, packed, scale, cols, block, given, group, bias, weights)


def check(call: Callable[[str, tuple[Any, ...]], Any], found: Iterator[Case]) -> None:
    for op, args in found:
        try:
            got = call(op, args)
            if op in EXACT:
                assert_same(op, got, ops._library.REFERENCES[op](*args))
            else:
                assert_within(got.cpu(), *EXPECTED[op](*args))
        except (AssertionError, RuntimeError) as error:
            shown = [f"{list(a.shape)} {a.dtype} {a.stride()}" if isinstance(a, Tensor) else a for a in args]
            raise AssertionError(f"{op}{shown}: {error}") from error


# What half a unit in the last place of a dtype is, relative to the number, and its smallest step.
ROUNDING = {
    torch.float32: (2.0**-24, 2.0**-149),
    torch.float16: (2.0**-11, 2.0**-25),
    torch.bfloat16: (2.0**-8, 2.0**-133),
}


def assert_within(got: Tensor, exact: Tensor, error: Tensor) -> None:
    """got is `exact` (fp64) but for `error` and the rounding to its dtype; NaN and infinities where they belong."""
    relative, absolute = ROUNDING[got.dtype]
    found = got.double()
    limit = torch.finfo(got.dtype).max
    finite = exact.isfinite() & (exact.abs() + error < limit)
    assert torch.equal(found.isnan(), exact.isnan()), "NaN in other places"
    infinite = exact.isinf()
    assert torch.equal(found[infinite], exact[infinite]), "infinities in other places"
    allowed = error + (exact.abs() + error) * relative + absolute
    over = ((found - exact).abs() > allowed) & finite
    assert not over.any(), (
        f"{int(over.sum())} of {got.numel()} beyond the bound, first at {over.nonzero()[0].tolist()}: "
        f"{found[over][0]} is not {exact[over][0]} +- {allowed[over][0]}"
    )


Expected = tuple[Tensor, Tensor]  # the exact result in fp64, and how far from it fp32 arithmetic may be


def expected_int8_mixed(
    x: Tensor, packed: Tensor, scale: Tensor, cols: int, threshold: float, bias: Tensor | None
) -> Expected:
    weight = ops.w8a8.unpack_codes(packed, cols, x.shape[1]).double()
    outlier = (x.float().abs() >= threshold).any(0)
    given, input_scale, _ = ops._library.REFERENCES["int8_quant_per_token"](x.masked_fill(outlier, 0.0), True)
    first = (given.double() @ weight.T) * (input_scale.double() * scale.double())
    wide = x[:, outlier].double()
    exact = first + (wide @ weight[:, outlier].T) * scale.double()
    size = first.abs() + (wide.abs() @ weight[:, outlier].abs().T) * scale.double()
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    return exact, size.nan_to_num() * (int(outlier.sum()) + 6) * 2.0**-24


def expected_sum(x: Tensor, weight: Tensor, size: Tensor, bias: Tensor | None, steps: int) -> Expected:
    """x weight^T + bias in fp32 steps that each lose 2^-24 of |x| size^T."""
    exact, most = x @ weight.T, x.abs() @ size.T
    if bias is not None:
        exact, most = exact + bias.double(), most + bias.double().abs()
    return exact, most.nan_to_num() * steps * 2.0**-24


def expected_wna16(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    perm: Tensor | None,
    bias: Tensor | None,
    bits: int,
    cols: int,
    group: int,
) -> Expected:
    scale = ops.wna16.rows_of_panels(scale, cols)
    zero = None if zero is None else ops.wna16.rows_of_panels(zero, cols)
    depth, groups = x.shape[1], scale.shape[1]
    words = ops.wna16._codes_of_words(packed.transpose(1, 2), ops.wna16._shifts(bits, packed.device), bits)
    code = words.reshape(packed.shape[0] * 64, -1)[:cols, :depth].double() - 2 ** (bits - 1)
    each = scale.double().repeat_interleave(depth // groups, 1)
    offset = torch.zeros_like(code) if zero is None else zero.double().repeat_interleave(depth // groups, 1)
    wide = (x if perm is None else x[:, perm.long()]).double()
    return expected_sum(wide, (code - offset) * each, (code.abs() + offset.abs()) * each, bias, depth + groups + 4)


def expected_bf16(x: Tensor, packed: Tensor, bias: Tensor | None, cols: int) -> Expected:
    numbers = packed.transpose(1, 2).flatten().view(torch.bfloat16)
    weight = numbers.view(packed.shape[0] * 64, -1)[:cols, : x.shape[1]].double()
    return expected_sum(x.double(), weight, weight.abs(), bias, x.shape[1] + 4)


# What sums of FP8 codes lose besides, of sum |a| |w|: nothing where their values are multiplied. Tensor cores that take
# the codes add 32 products and what is there, all aligned to the largest L of them and cut off below 2^-13 L, four
# times for the 128 columns after which the sum is added to others in fp32: 4 x 33 x 2^-13. The emulation adds them
# exactly and cuts off the sum: 4 x 2^-13.
FLOAT8_CUT_EMULATED = 4 * 2.0**-13
FLOAT8_CUT = 33 * FLOAT8_CUT_EMULATED
float8_cut = FLOAT8_CUT_EMULATED


def expected_fp8(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    block: list[int],
    cols: int,
    input_scale: Tensor | None,
    input_block: list[int] | None,
    bias: Tensor | None,
) -> Expected:
    depth = x.shape[1]
    a, input_scales, group = quantized(x, input_scale, input_block)
    wide = a.double()
    if input_scales is not None:
        wide = wide * input_scales.double().repeat_interleave(group, 1)[:, :depth]
    weight = unpack_codes(packed, cols, depth).double()
    weight = weight * ops._library.expand(scale.double(), cols, depth, block)
    segments = depth // 8 + 1  # at least as many as there are, or are made
    exact, error = expected_sum(wide, weight, weight.abs(), bias, depth + segments + 4)
    if input_scales is not None:
        error = error + (wide.abs() @ weight.abs().T).nan_to_num() * float8_cut
    return exact, error


def of_experts(single: str) -> Callable[..., Expected]:
    """What the single op may give for each expert's rows, times the row scales."""

    def expected(*args: Any) -> Expected:
        schema = getattr(torch.ops.quantkit, f"moe_{single}").default._schema.arguments
        values = {a.name: value for a, value in zip(schema, args, strict=True)}
        x, row_scale, bounds = values.pop("x"), values.pop("row_scale"), values.pop("offsets").tolist()
        names = [a.name for a in getattr(torch.ops.quantkit, single).default._schema.arguments]
        found = []
        for e, (begin, end) in enumerate(itertools.pairwise(bounds)):
            own = {
                name: value[e : e + 1] if name == "input_scale" and value is not None
                else value[e] if isinstance(value, Tensor) else value
                for name, value in values.items()
            }  # fmt: skip
            own["x"] = x[begin:end]
            if begin < end:
                found.append(EXPECTED[single](*(own[name] for name in names)))
        exact, error = (torch.cat(parts) for parts in zip(*found, strict=True))
        if row_scale is not None:
            relative, absolute = ROUNDING[x.dtype]
            error = (error + (exact.abs().nan_to_num() + error) * relative + absolute) * row_scale[:, None].double()
            exact = exact * row_scale[:, None].double()
        return exact, error

    return expected


EXPECTED: dict[str, Callable[..., Expected]] = {
    "int8_mixed_gemm": expected_int8_mixed,
    "wna16_gemm": expected_wna16,
    "bf16_gemm": expected_bf16,
    "fp8_gemm": expected_fp8,
    "moe_wna16_gemm": of_experts("wna16_gemm"),
    "moe_fp8_gemm": of_experts("fp8_gemm"),
}
