"""pack_w8a8, int8_gemm and w8a8_gemm: sums exact, results bit for bit those of the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import quantkit.ops as ops
from quantkit.ops.w8a8 import MAX_ASYMMETRIC_DEPTH, MAX_DEPTH

from .cpu_cases import FLOATS, KINDS, check, check_compiles, check_refused, matrix

# M, N, K around the sizes of tiles (6 rows, 64 columns, words of 4) and of blocks of K (4096).
SHAPES = ((1, 1, 1), (2, 64, 4), (3, 63, 31), (5, 65, 66), (6, 130, 130), (7, 17, 257), (13, 200, 96), (50, 70, 64))
DEEP = ((1, 70, 4097), (5, 66, 4100), (14, 64, 9001))


def codes(*shape: int, seed: int = 0) -> Tensor:
    """Every int8 code, the extremes more often than their share."""
    generator = torch.Generator().manual_seed(seed + shape[0])
    wide = torch.randint(-160, 161, shape, generator=generator)
    return wide.clamp(-128, 127).to(torch.int8)


def apart(x: Tensor) -> Tensor:
    """The same matrix with its rows apart and its beginning off any alignment."""
    wide = x.new_zeros((x.shape[0], x.shape[1] + 5))
    wide[:, 3 : 3 + x.shape[1]] = x
    return wide[:, 3 : 3 + x.shape[1]]


@pytest.mark.parametrize(("m", "n", "k"), SHAPES + DEEP)
def test_sums_are_exact(m: int, n: int, k: int) -> None:
    a, w = codes(m, k), codes(n, k, seed=1)
    check("pack_w8a8", w)
    check("pack_w8a8", apart(w))
    packed = ops.pack_w8a8(w)
    assert torch.equal(ops.w8a8.unpack_codes(packed, n, k), w)
    exact = (a.long() @ w.long().T).int()
    assert torch.equal(ops.int8_gemm(a, packed, n), exact)
    assert torch.equal(ops.int8_gemm(apart(a), packed, n), exact)


@pytest.mark.parametrize(("a", "w"), [(-128, -128), (-128, 127), (127, -128)])
def test_longest_rows(a: int, w: int) -> None:
    packed = ops.pack_w8a8(torch.full((3, MAX_DEPTH), w, dtype=torch.int8))
    result = ops.int8_gemm(torch.full((2, MAX_DEPTH), a, dtype=torch.int8), packed, 3)
    assert (result == a * w * MAX_DEPTH).all()
    # Codes of 127 with a zero point of -128 count 255 each.
    x, scale = torch.full((1, MAX_ASYMMETRIC_DEPTH), 255.0), torch.ones(1)
    packed = ops.pack_w8a8(torch.full((3, MAX_ASYMMETRIC_DEPTH), w, dtype=torch.int8))
    zero_point = torch.tensor([-128], dtype=torch.int8)
    result = ops.w8a8_gemm(x, packed, scale, 3, input_scale=scale, input_zero_point=zero_point)
    assert (result == float(255 * w * MAX_ASYMMETRIC_DEPTH)).all()


def test_many_rows() -> None:
    """More rows than are quantized at once, and more threads' pieces than panels."""
    a, w = codes(700, 12292), codes(5, 12292)
    assert torch.equal(ops.int8_gemm(a, ops.pack_w8a8(w), 5), (a.double() @ w.double().T).int())


def arguments(m: int, n: int, k: int, dtype: torch.dtype, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    scale = torch.rand(n, generator=torch.Generator().manual_seed(n)) - 0.2  # negative ones too
    return matrix(m, k, dtype, kind), ops.pack_w8a8(codes(n, k)), scale / 50


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_like_the_reference(dtype: torch.dtype, kind: str) -> None:
    for m, n, k in (*SHAPES, DEEP[2]) if kind == "normal" else SHAPES[4:7]:
        x, packed, scale = arguments(m, n, k, dtype, kind)
        bias = torch.randn(n)
        for symmetric in (True, False):
            check("w8a8_gemm", x, packed, scale, n, None, None, symmetric, None)
            check("w8a8_gemm", apart(x), packed, scale[:1].contiguous(), n, None, None, symmetric, bias)
        step, zero_point = torch.tensor([0.013]), torch.tensor([-57], dtype=torch.int8)
        check("w8a8_gemm", x, packed, scale, n, step, None, True, bias.to(dtype))
        check("w8a8_gemm", x, packed, scale, n, step, zero_point, True, bias)
        check("w8a8_gemm", x, packed, scale, n, step, zero_point, False, None)


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_are_those_of_the_quantizer(symmetric: bool) -> None:
    """Against the ops that a reader would use one after the other, not against the reference."""
    x, w, scale = torch.randn(9, 300).bfloat16(), codes(40, 300), torch.rand(40) + 0.1
    q, s, zero_point = ops.int8_quant_per_token(x, symmetric)
    wide = q.long() if symmetric else q.long() - zero_point.long()
    y = (wide @ w.long().T).float() * (s * scale)
    assert torch.equal(ops.w8a8_gemm(x, ops.pack_w8a8(w), scale, 40, symmetric=symmetric), y.bfloat16())
    exact = (x.double() * 1.0) @ (w.double() * scale.double()[:, None]).T
    # Half a step of each input at most, and the rounding of the result.
    bound = 0.51 * s.double() * (w.double() * scale.double()[:, None]).abs().sum(1) + 2.0**-8 * exact.abs()
    assert ((y.bfloat16().double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_takes_its_row_and_no_other(dtype: torch.dtype) -> None:
    x, packed, scale = arguments(8, 20, 70, dtype, "normal")
    clean = [ops.w8a8_gemm(x, packed, scale, 20, input_scale=s) for s in (None, torch.tensor([0.01]))]
    x[2, 69], x[5, 0] = float("nan"), float("nan")
    for step, before in zip((None, torch.tensor([0.01])), clean, strict=True):
        after = ops.w8a8_gemm(x, packed, scale, 20, input_scale=step)
        assert after[[2, 5]].isnan().all()
        others = [0, 1, 3, 4, 6, 7]
        assert torch.equal(after[others], before[others])


def test_threads_leave_no_trace() -> None:
    threads, results = torch.get_num_threads(), []
    x, packed, scale = arguments(60, 200, 5000, torch.bfloat16, "normal")
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(ops.w8a8_gemm(x, packed, scale, 200, symmetric=False))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_empty() -> None:
    scale = torch.tensor([-2.0])
    for m, n, k in ((0, 5, 7), (4, 0, 7), (4, 5, 0)):
        x, packed = torch.ones(m, k), ops.pack_w8a8(codes(n, k) if n else torch.zeros(0, k, dtype=torch.int8))
        check("int8_gemm", x.to(torch.int8), packed, n)
        check("w8a8_gemm", x, packed, scale, n, None, None, False, None)
        check("w8a8_gemm", x, packed, scale, n, scale, None, True, torch.ones(n))


def test_refuses() -> None:
    x, w, scale = torch.ones(2, 8), codes(3, 8), torch.ones(3)
    packed, one, zero_point = ops.pack_w8a8(w), torch.ones(1), torch.zeros(1, dtype=torch.int8)
    check_refused("pack_w8a8", r"codes must be torch.int8 \[N, K\], got torch.float32 \[2, 8\]", x)
    check_refused("pack_w8a8", "K must be at most 131071", torch.zeros(0, MAX_DEPTH + 1, dtype=torch.int8))
    check_refused("int8_gemm", r"a must be torch.int8 \[M, K\]", x, packed, 3)
    check_refused("int8_gemm", r"packed must be what pack_w8a8 makes of int8 \[3, 9\]", codes(2, 9), packed, 3)
    check_refused("int8_gemm", "out_features must not be negative", w, packed, -1)

    def refused(message: str, *args: object) -> None:
        check_refused("w8a8_gemm", message, *args)

    refused("x must be float32, float16 or bfloat16", w, packed, scale, 3, None, None, True, None)
    refused("x must be 2-D", x[0], packed, scale, 3, None, None, True, None)
    refused(r"packed must be what pack_w8a8 makes of int8 \[65, 8\]", x, packed, scale, 65, None, None, True, None)
    two = ops.pack_w8a8(codes(70, 8)).T.contiguous().T
    refused("packed must be contiguous", x, two, one, 70, None, None, True, None)
    refused(r"weight_scale must be torch.float32 \[3\] or \[1\]", x, packed, scale[:2], 3, None, None, True, None)
    refused("weight_scale must be contiguous", x, packed, torch.ones(6)[::2], 3, None, None, True, None)
    refused(r"bias must be torch.float32 or x's dtype \[3\]", x, packed, scale, 3, None, None, True, scale.half())
    refused("bias must be contiguous", x, packed, scale, 3, None, None, True, torch.ones(6)[::2])
    refused(r"input_scale must be torch.float32 \[1\]", x, packed, scale, 3, scale, None, True, None)
    refused(r"input_zero_point must be torch.int8 \[1\]", x, packed, scale, 3, one, one, True, None)
    refused("input_zero_point needs input_scale", x, packed, scale, 3, None, zero_point, True, None)
    refused("symmetric=False with input_scale needs", x, packed, scale, 3, one, None, False, None)
    deep = MAX_ASYMMETRIC_DEPTH + 1
    packed = ops.pack_w8a8(torch.zeros(1, deep, dtype=torch.int8))
    refused("K must be at most 65793 with", torch.ones(1, deep), packed, one, 1, None, None, False, None)
    with pytest.raises(RuntimeError, match="last dimension contiguous"):
        ops.int8_gemm(codes(8, 2).T, ops.pack_w8a8(w), 3)


def test_compiles() -> None:
    x, packed, scale = arguments(3, 20, 33, torch.bfloat16, "normal")
    check_compiles("pack_w8a8", codes(5, 9))
    check_compiles("int8_gemm", codes(3, 33), packed, 20)
    check_compiles("w8a8_gemm", x, packed, scale, 20, None, None, False, None)
    check_compiles("w8a8_gemm", x, packed, scale, 20, scale[:1].abs(), None, True, torch.ones(20))
