"""What the CUDA ops are asked, on the host emulation and on a device alike: every op over shapes, blocks and dtypes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import quantkit.ops as ops

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# Rows and columns on and off every boundary: of chunks (8), warps, teams, tiles of a two-step reduction.
SHAPES = ((1, 1), (3, 5), (16, 128), (7, 264), (33, 100), (130, 24), (9, 2600), (300, 200))
BLOCKS = ([-1, -1], [1, -1], [1, 8], [1, 32], [1, 128], [1, 3], [-1, 1], [4, 1], [16, 16], [5, 24], [-1, 32], [2, 7])
Case = tuple[str, tuple[Any, ...]]


def matrix(rows: int, cols: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Values of many magnitudes with a row of zeros, and what a kernel may stumble over strewn in."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=generator) * torch.exp(2 * torch.randn(rows, 1, generator=generator))
    if rows > 2:
        x[1] = 0.0
    flat = x.view(-1)
    if rows > 6:
        for value in (float("nan"), float("inf"), -float("inf"), -0.0, 1e-40, 6e4, -1e30):
            flat[int(torch.randint(flat.numel(), (), generator=generator))] = value
    return x.to(dtype)


def cases(x: Tensor, block: list[int]) -> Iterator[Case]:
    """Every op that takes a matrix and a block. Scales and codes come from the references."""
    yield "absmax", (x, block)
    yield "minmax", (x, block)
    reference = ops._library.REFERENCES
    amax = reference["absmax"](x, block)
    low, high = reference["minmax"](x, block)
    for dtype in FLOATS:
        yield "symmetric_scale", (amax, 7.5, dtype)
        yield "asymmetric_scale", (low, high, -8, 7, dtype)
    symmetric = reference["symmetric_scale"](amax, 127.0, torch.float32)
    asymmetric, zero_point = reference["asymmetric_scale"](low, high, -128, 127, torch.float32)
    yield "quantize_int", (x, symmetric, None, block, -127, 127)
    yield "quantize_int", (x, asymmetric, zero_point, block, -128, 127)
    codes = reference["quantize_int"](x, asymmetric, zero_point, block, -128, 127)
    for dtype in FLOATS:
        yield "dequantize", (codes, symmetric, None, block, dtype)
        yield "dequantize", (codes, asymmetric, zero_point, block, dtype)
    for dtype in FP8:
        scale = reference["symmetric_scale"](amax, ops.FP8_MAX[dtype], torch.float32)
        yield "quantize_fp8", (x, scale, block, dtype)
        small = reference["quantize_fp8"](x, scale, block, dtype)
        yield "dequantize", (small, scale, None, block, torch.float32)
        yield "quantization_error", (x, small, scale, None, block)
        yield "rtn_fp8", (x, block, dtype)
    yield "quantization_error", (x, codes, asymmetric, zero_point, block)
    yield "rtn_int", (x, block, -127, 127, True, 127.0, torch.float32, 0)
    yield "rtn_int", (x, block, -128, 127, False, 0.0, torch.float32, 8)
    yield "rtn_int", (x, block, -8, 7, True, 7.5, torch.bfloat16, 4)
    yield "rtn_int", (x, block, -8, 7, False, 0.0, torch.float16, 4)


def token_cases(x: Tensor) -> Iterator[Case]:
    yield "int8_quant_per_token", (x, True)
    yield "int8_quant_per_token", (x, False)
    for dtype in FP8:
        yield "fp8_quant_per_token", (x, dtype)


def pack_cases(rows: int, cols: int) -> Iterator[Case]:
    codes = torch.randint(-128, 128, (rows, cols), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    for bits in (4, 8):
        yield "pack_int32", (codes, bits)
        yield "unpack_int32", (ops._library.REFERENCES["pack_int32"](codes, bits), bits, cols)


def weight_cases(rows: int, cols: int) -> Iterator[Case]:
    """Ops that lay weights out for the GEMMs, from contiguous rows and from wider, misaligned ones."""
    generator = torch.Generator().manual_seed(rows * 1009 + cols)
    wide = torch.randint(-128, 128, (rows, cols + 3), dtype=torch.int8, generator=generator)
    for codes in (wide[:, :cols].contiguous(), wide[:, 1 : 1 + cols]):
        yield "pack_w8a8", (codes,)
        yield "pack_fp8", (codes.view(torch.float8_e4m3fn),)
        yield "pack_bf16", (codes.to(torch.bfloat16),)
    perm = torch.randperm(cols, generator=generator).to(torch.int32)
    for bits in (4, 8):
        count = (cols * bits + 31) // 32
        words = torch.randint(-(2**31), 2**31, (rows, count + 1), dtype=torch.int32, generator=generator)
        for some in (words[:, :count].contiguous(), words[:, 1:]):
            yield "pack_wna16", (some, bits, cols, None)
            yield "pack_wna16", (some, bits, cols, perm)
            if bits == 4:
                yield "pack_w4a8", (some, cols)


def fp4_cases(rows: int, cols: int) -> Iterator[Case]:
    """cols even."""
    generator = torch.Generator().manual_seed(rows * 1009 + cols)
    for dtype in FLOATS:
        x = matrix(rows, cols, dtype)
        for group in (2, 6, 16, 32):
            scale = torch.rand(rows, -(-cols // group), generator=generator) + 0.1
            yield "quantize_fp4", (x, scale, group)
        ties = torch.randint(-24, 25, (rows, cols + 2), generator=generator).to(dtype) / 4
        yield "quantize_fp4", (ties[:, 1 : 1 + cols], torch.ones(rows, -(-cols // 16)), 16)
    packed = torch.randint(0, 256, (rows, cols // 2 + 1), dtype=torch.uint8, generator=generator)
    yield "unpack_fp4", (packed[:, : cols // 2].contiguous(),)
    yield "unpack_fp4", (packed[:, 1:],)


def relocate(value: Any, copy: Callable[[Tensor], Tensor]) -> Any:
    """The same tensor where `copy` puts contiguous ones, strides included; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    if value.is_contiguous():
        return copy(value)
    extent = 1 + sum((n - 1) * stride for n, stride in zip(value.shape, value.stride(), strict=True))
    return copy(value.as_strided((extent,), (1,), value.storage_offset())).as_strided(value.shape, value.stride())


# Of ops that give nothing back: the arguments they write to.
WRITTEN = {"gram_accumulate": (2, 3), "histogram_accumulate": (2, 3), "kv_append": (2, 3, 4, 5)}


def results(op: str, returned: Any, args: Sequence[Any]) -> Any:
    """What the op gave back, or wrote to."""
    return tuple(args[i] for i in WRITTEN[op] if args[i] is not None) if op in WRITTEN else returned


def strided() -> Iterator[Tensor]:
    """Matrices that are not contiguous: narrow, off alignment, transposed, with steps, one row many times."""
    base = matrix(34, 96, torch.bfloat16)
    yield from (base[:, :64], base[:, 3:67], base.t(), base[::2], base[:, ::2], base[:1].expand(5, 96))


def assert_same(op: str, got: Any, wanted: Any) -> None:
    """Bit for bit, but for which NaN it is, the sign of a zero extreme, and the order of quantization_error's sums."""
    if isinstance(wanted, (tuple, list)):
        assert len(got) == len(wanted)
        for one, other in zip(got, wanted, strict=True):
            assert_same(op, one, other)
        return
    got = got.cpu()
    assert (got.dtype, got.shape, got.stride()) == (wanted.dtype, wanted.shape, wanted.stride())
    if op == "quantization_error":
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0, equal_nan=True)
        assert torch.equal(got[2:].nan_to_num(-1.0), wanted[2:].nan_to_num(-1.0))
    elif op == "minmax":
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
    else:
        if wanted.dtype.is_floating_point:
            nan = wanted.float().isnan()
            assert torch.equal(nan, got.float().isnan()), f"{op}: NaN in other places"
            got, wanted = (t.view(BITS[t.element_size()]).masked_fill(nan, 0) for t in (got, wanted))
        different = got != wanted
        assert not different.any(), (
            f"{op}: {int(different.sum())} of {got.numel()} differ, first at {different.nonzero()[0].tolist()}: "
            f"{got[different][0]} is not {wanted[different][0]}"
        )


BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def check(call: Callable[[str, tuple[Any, ...]], Any], found: Iterator[Case]) -> None:
    for op, args in found:
        try:
            assert_same(op, call(op, args), ops._library.REFERENCES[op](*args))
        except (AssertionError, RuntimeError) as error:
            shown = [f"{list(a.shape)} {a.dtype} {a.stride()}" if isinstance(a, Tensor) else a for a in args]
            raise AssertionError(f"{op}{shown}: {error}") from error
