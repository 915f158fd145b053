"""quantize_fp4 and unpack_fp4, and the scales of MX and NVFP4."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch
from torch import Tensor

import quantkit.ops as ops

from .cpu_cases import FLOATS, KINDS, check, check_compiles, check_refused, matrix

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SHAPES = ((1, 2), (3, 32), (7, 48), (33, 130), (5, 300), (64, 256))


def matrices(dtype: torch.dtype, kind: str) -> list[Tensor]:
    """Contiguous, and rows apart with their beginning off any alignment."""
    wide = [matrix(rows, cols + 3, dtype, kind) for rows, cols in SHAPES]
    return [part for w in wide for part in (w[:, :-3].contiguous(), w[:, 1:-2])]


def groups(x: Tensor, size: int) -> Tensor:
    """Scales that are too small here and there, so that some values saturate."""
    amax = ops.absmax(x.nan_to_num(1.0, 1.0, 1.0), [1, size])
    return (0.13 * amax).clamp(min=1e-30)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_like_the_reference(dtype: torch.dtype, kind: str) -> None:
    for x in matrices(dtype, kind):
        for size in (2, 16, 32, 34, 512):
            scale = groups(x, size)
            check("quantize_fp4", x, scale, size)
            check("unpack_fp4", ops.quantize_fp4(x, scale, size))


def test_nearest_of_all_values_and_ties_to_even() -> None:
    """Against exact arithmetic: every middle between neighbours, and the numbers on either side of it."""
    middles = [(a + b) / 2 for a, b in itertools.pairwise(VALUES)]
    around = [torch.nextafter(torch.tensor(m), torch.tensor(to)).item() for m in middles for to in (-9.0, 9.0)]
    numbers = [*middles, *around, *VALUES, 7.0, 1e30, float("inf")]
    x = torch.tensor([[s * n for n in numbers for s in (1, -1)]])
    codes = ops.quantize_fp4(x, torch.ones(1, 1), x.shape[1] // 2 * 2)
    for i, value in enumerate(x[0].tolist()):
        exact = Fraction(min(abs(value), 100.0))
        best = min(range(8), key=lambda c: (abs(Fraction(VALUES[c]) - exact), c % 2))
        code = int(codes[0, i // 2]) >> i % 2 * 4 & 15
        assert code == best + (8 if value < 0 else 0), value
        assert ops.unpack_fp4(codes)[0, i].float() == VALUES[best] * (-1 if value < 0 else 1)


def test_zero_has_no_sign_and_nan_is_zero() -> None:
    x = torch.tensor([[0.0, -0.0, float("nan"), -1e-30, 1e-30, -0.2]])
    assert ops.quantize_fp4(x, torch.ones(1, 1), 6).tolist() == [[0, 8 << 4, 8 << 4]]


def test_every_byte_unpacks() -> None:
    packed = torch.arange(256, dtype=torch.uint8).reshape(4, 64)
    check("unpack_fp4", packed)
    check("unpack_fp4", packed[:, 3:-2])
    signed = [*VALUES, *(-v for v in VALUES)]
    expected = [v for byte in range(256) for v in (signed[byte & 15], signed[byte >> 4])]
    assert ops.unpack_fp4(packed).float().flatten().tolist() == expected


def test_e8m0_scales_keep_the_largest_element() -> None:
    """A power of two with amax / scale below 7 (FP4) or 448 (FP8), and no less than half of that."""
    amax = torch.cat(
        [torch.logspace(-37, 38, 4001), 2.0 ** torch.arange(-120, 120), 1.75 * 2.0 ** torch.arange(-120, 120)]
    )
    for bits, largest in ((4, 7.0), (8, 448.0)):
        scale = ops.e8m0_scale(amax, bits)
        held = (scale > 2.0**-127) & amax.isfinite()
        ratio = amax[held].double() / scale[held].double()
        assert bool((ratio < largest).all()) and bool((ratio >= largest / 2).all())
        assert torch.equal(ops.e8m0_decode(ops.e8m0_encode(scale)), scale)
    special = torch.tensor([0.0, 1e-40, float("nan"), float("inf")])
    assert ops.e8m0_scale(special, 4)[:2].tolist() == [2.0**-127] * 2
    assert not ops.e8m0_scale(special, 4)[2:].isfinite().any()
    codes = torch.arange(255, dtype=torch.uint8)
    assert torch.equal(ops.e8m0_encode(ops.e8m0_decode(codes)), codes) and ops.e8m0_decode(codes[:1] - 1).isnan()


def test_nvfp4_scales() -> None:
    amax = torch.rand(50, 7) * 3
    amax[0], amax[1, 0] = 0.0, 1e-9
    divisor = ops.nvfp4_global_scale(amax.amax())
    assert divisor.shape == (1,) and divisor == 2688.0 / amax.amax()
    scale = ops.nvfp4_scale(amax, divisor)
    local = ops.nvfp4_local(scale, divisor)
    assert local.float().max() == 448.0 and local.float().min() == 2.0**-9
    assert torch.equal(local.float() / divisor, scale)
    exact = (amax.double() / 6 * divisor.double())[2:]
    assert bool(((local[2:].double() - exact).abs() <= exact / 16 + 2.0**-10).all())
    assert ops.nvfp4_global_scale(torch.zeros(1)) == 1.0
    assert ops.nvfp4_global_scale(torch.tensor(float("nan"))).isnan()


@pytest.mark.parametrize("shape", [(0, 32), (3, 0), (0, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    check("quantize_fp4", torch.zeros(shape), torch.zeros(shape[0], -(-shape[1] // 16)), 16)
    check("unpack_fp4", torch.zeros(shape, dtype=torch.uint8))


def test_threads_change_nothing() -> None:
    x = matrix(257, 512, torch.bfloat16, "normal")
    scale, before = groups(x, 16), torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(ops.quantize_fp4(x, scale, 16))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_refused() -> None:
    x, scale = torch.ones(2, 32), torch.ones(2, 2)
    check_refused("quantize_fp4", "group_size must be positive and even, got 15", x, scale, 15)
    check_refused("quantize_fp4", "group_size must be positive and even, got 0", x, scale, 0)
    check_refused("quantize_fp4", r"scale must be float32 \[2, 1\] for x", x, scale, 32)
    check_refused("quantize_fp4", "x must have an even number of columns, got 31", x[:, :31], scale, 16)
    check_refused("quantize_fp4", "x must be float32, float16 or bfloat16", x.int(), scale, 16)
    check_refused("unpack_fp4", "packed must be 2-D torch.uint8, got 2-D torch.float32", x)
    check_refused("unpack_fp4", "packed must be 2-D torch.uint8, got 1-D torch.uint8", x[0].byte())


def test_compiles() -> None:
    check_compiles("quantize_fp4", torch.randn(5, 64), torch.rand(5, 4) + 0.1, 16)
    check_compiles("unpack_fp4", torch.arange(64, dtype=torch.uint8).reshape(4, 16))
