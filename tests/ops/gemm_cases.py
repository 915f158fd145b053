"""What the CUDA GEMMs are asked, on the host emulation and on a device alike, and what they must answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import quantkit.ops as ops

from .cuda_cases import FLOATS, Case, assert_same

# Rows of every kind of tile (16, 32, 64, 128) with and without a rest, columns off the panels, depths off every vector
# and stage; the last ones are split along K.
SHAPES = ((1, 1, 1), (3, 70, 36), (16, 64, 512), (17, 130, 129), (40, 96, 264), (65, 200, 100), (130, 140, 72))
DEEP = ((2, 40, 2112), (20, 64, 4160))

# Exact, bit for bit: sums are integers, and what is done to them has an order.
EXACT = {"int8_gemm", "w8a8_gemm", "moe_w8a8_gemm"}
OPS = EXACT | {"int8_mixed_gemm"}


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


EXPECTED: dict[str, Callable[..., Expected]] = {"int8_mixed_gemm": expected_int8_mixed}
