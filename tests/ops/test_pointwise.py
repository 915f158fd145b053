"""rms_norm, silu_mul, what they are with quantization behind them, rotary_embedding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit import ops

from .cpu_cases import FLOATS, call, check_compiles, check_refused, matrices, matrix, reference

# Half the distance of neighbours, relative, and of the least subnormal ones.
HALF_ULP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
LEAST = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}
CODES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


def assert_close(found: Tensor, wanted: Tensor, relative: float, absolute: Tensor | float = 0.0) -> None:
    """`found` is the fp64 `wanted` up to an error within fp32, and rounding once."""
    half = HALF_ULP[found.dtype]
    bound = wanted.abs() * (relative + half + relative * half) + LEAST[found.dtype] + absolute
    assert not ((found.double() - wanted).abs() > bound).any()


def norm64(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight.double()


def norm_error(cols: int) -> float:
    """Of a sum of squares in 16 or more parts, mean, root, inverse and two products, each rounded to fp32."""
    return (cols / 16 / 2 + 12) * 2.0**-24


@pytest.mark.parametrize("dtype", FLOATS)
def test_rms_norm(dtype: torch.dtype) -> None:
    for x in matrices(dtype, "normal"):
        weight = torch.randn(x.shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
        for epsilon in (1e-5, 0.0):
            if epsilon == 0.0 and bool((x == 0).all(-1).any()):
                continue
            out, none = call("rms_norm", x, None, weight, epsilon)
            assert out.dtype == dtype and none.numel() == 0
            assert_close(out, norm64(x, weight, epsilon), norm_error(x.shape[1]))
            out, total = call("rms_norm", x, x.flip(0), weight, 1e-5)
            assert torch.equal(total, (x.float() + x.flip(0).float()).to(dtype))
            assert_close(out, norm64(total, weight, 1e-5), norm_error(x.shape[1]))


def test_rms_norm_of_zeros_and_of_what_is_not_finite() -> None:
    x = torch.zeros(4, 40)
    x[1, 3], x[2, 3] = float("nan"), float("inf")
    out = ops.rms_norm(x, torch.ones(40), 1e-6)
    assert bool(out[[0, 3]].eq(0).all()) and bool(out[1].isnan().all()) and bool(out[2, 3].isnan())


@pytest.mark.parametrize("dtype", FLOATS)
def test_silu_mul(dtype: torch.dtype) -> None:
    for x in matrices(dtype, "normal"):
        gate, up = x * 8, x.flip(1)
        wide = gate.double()
        wanted = wide * torch.sigmoid(wide) * up.double()
        # An argument of the power of up to |gate| log2(e), rounded, is off by as much times 2^-24; four more roundings.
        error = (float(wide.abs().max()) * 1.5 * 0.7 + 8) * 2.0**-24
        assert_close(call("silu_mul", gate, up), wanted, error, absolute=2.0**-100)
    both = matrix(9, 74, dtype, "normal")
    halves = both.view(3, 3, 74).split(37, -1)
    assert torch.equal(ops.silu_mul(*halves), ops.silu_mul(*(h.contiguous() for h in halves)))


def test_silu_mul_far_out() -> None:
    gate = torch.tensor([-1e30, -200.0, -100.0, -88.0, 0.0, 100.0, 1e30, float("nan")])
    out = ops.silu_mul(gate, torch.ones(8))
    assert bool((out[:4].abs() < 1e-6).all()) and out[4] == 0 and out[5] == 100 and out[6] == 1e30 and out[7].isnan()


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_quantized_as_by_two_ops(dtype: torch.dtype, codes: torch.dtype) -> None:
    def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
        return ops.int8_quant_per_token(x)[:2] if codes == torch.int8 else ops.fp8_quant_per_token(x, codes)

    for kind in ("normal", "zero rows"):
        for x in matrices(dtype, kind):
            weight = torch.ones(x.shape[1], dtype=dtype)
            for residual in (None, x.flip(0)):
                out, total = call("rms_norm", x, residual, weight, 1e-5)
                same(call("rms_norm_quant", x, residual, weight, 1e-5, codes), (*quantized(out), total))
            same(call("silu_mul_quant", x, x.flip(0), codes), quantized(ops.silu_mul(x, x.flip(0))))


def same(found: Any, wanted: Any) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(2, 3, 5, 64, 64), (1, 1, 1, 16, 10), (2, 4, 7, 80, 24), (3, 2, 4, 6, 0)])
def test_rotary(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    batch, heads, tokens, size, turned = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, tokens, heads, size, generator=generator).to(dtype).transpose(1, 2)
    for rows in (1, batch):
        angle = torch.randn(rows, tokens, turned, generator=generator)
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        out = call("rotary_embedding", x, cos, sin)
        first, second = x[..., :turned].double().chunk(2, -1)
        other = torch.cat((-second, first), -1) * sin.double()[:, None]
        one = x[..., :turned].double() * cos.double()[:, None]
        assert_close(out[..., :turned], one + other, 0.0, absolute=(one.abs() + other.abs()) * 2.0**-23)
        assert torch.equal(out[..., turned:], x[..., turned:])
        wanted = reference("rotary_embedding", x, cos, sin)
        assert out.stride() == wanted.stride()


def test_threads_leave_no_trace() -> None:
    x = matrix(300, 500, torch.bfloat16, "normal")
    weight = torch.ones(500, dtype=torch.bfloat16)
    calls = [("rms_norm", x, x, weight, 1e-5), ("silu_mul", x, x), ("rms_norm_quant", x, x, weight, 1e-5, torch.int8)]
    threads = torch.get_num_threads()
    try:
        found = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append([call(*c) for c in calls])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            same(a if isinstance(a, tuple) else (a,), b if isinstance(b, tuple) else (b,))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 4)])
def test_empty(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape)
    assert ops.silu_mul(x, x).shape == x.shape
    assert ops.rms_norm(x, torch.ones(shape[-1]), 1e-5).shape == x.shape


def test_refuses() -> None:
    x, weight = torch.ones(4, 6), torch.ones(6)
    check_refused("rms_norm", r"weight must be torch.float32 \[6\], got torch.float32 \[5\]", x, None, weight[:5], 1e-5)
    check_refused("rms_norm", "epsilon must not be negative, got -1", x, None, weight, -1.0)
    check_refused("rms_norm", "residual must have x's shape and dtype", x, x[:3], weight, 1e-5)
    check_refused("rms_norm", "x must be float32", x.double(), None, weight, 1e-5)
    check_refused("silu_mul", "up must have gate's shape and dtype", x, x.half())
    check_refused("silu_mul_quant", "dtype must be int8", x, x, torch.float32)
    check_refused("silu_mul_quant", "there must be a column", x[:, :0], x[:, :0], torch.int8)
    heads = torch.ones(1, 2, 3, 8)
    check_refused("rotary_embedding", "cos must be torch.float32", heads, torch.ones(1, 3, 7), torch.ones(1, 3, 7))
    check_refused("rotary_embedding", "x must be 4-D", x, torch.ones(1, 3, 6), torch.ones(1, 3, 6))


def test_compiles() -> None:
    x, weight = torch.randn(5, 70), torch.randn(70)
    check_compiles("rms_norm_quant", x, x, weight, 1e-5, torch.int8)
    check_compiles("silu_mul_quant", x, x, torch.float8_e4m3fn)
    torch.library.opcheck(torch.ops.quantkit.rms_norm.default, (x, x, weight, 1e-5))
    torch.library.opcheck(torch.ops.quantkit.silu_mul.default, (x, x))
    cos = torch.randn(1, 3, 8)
    torch.library.opcheck(torch.ops.quantkit.rotary_embedding.default, (torch.randn(2, 2, 3, 8), cos, cos))
