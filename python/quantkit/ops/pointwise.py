"""What stands between the products of a layer: RMS norm, SiLU times up, both with 8-bit codes for the next product, and
rotary embeddings. Each in one pass over its input, where torch's ops take one each for every step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import REFERENCES, check_float, declare

CODES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


def _check_like(op: str, name: str, other: Tensor, x_name: str, x: Tensor) -> None:
    torch._check(
        other.shape == x.shape and other.dtype == x.dtype,
        lambda: (
            f"quantkit::{op}: {name} must have {x_name}'s shape and dtype, {x.dtype} {list(x.shape)}, "
            f"got {other.dtype} {list(other.shape)}"
        ),
    )


def _check_tokens(op: str, name: str, x: Tensor) -> None:
    torch._check(x.dim() >= 1, lambda: f"quantkit::{op}: {name} must have at least one dimension")
    check_float(op, name, x)


def _check_norm(op: str, x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float) -> None:
    _check_tokens(op, "x", x)
    torch._check(
        weight.shape == x.shape[-1:] and weight.dtype == x.dtype,
        lambda: f"quantkit::{op}: weight must be {x.dtype} [{x.shape[-1]}], got {weight.dtype} {list(weight.shape)}",
    )
    torch._check(epsilon >= 0, lambda: f"quantkit::{op}: epsilon must not be negative, got {epsilon}")
    if residual is not None:
        _check_like(op, "residual", residual, "x", x)


def _check_codes(op: str, x: Tensor, dtype: torch.dtype) -> None:
    torch._check(
        dtype in CODES, lambda: f"quantkit::{op}: dtype must be int8, float8_e4m3fn or float8_e5m2, got {dtype}"
    )
    torch._check(x.shape[-1] > 0, lambda: f"quantkit::{op}: there must be a column to quantize, got {list(x.shape)}")


def _sum_like(x: Tensor, residual: Tensor | None) -> Tensor:
    return x.new_empty((0,) if residual is None else x.shape)


def _codes_like(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _quantized(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if dtype == torch.int8:
        codes, scale, _ = REFERENCES["int8_quant_per_token"](x, True)
        return codes, scale
    codes, scale = REFERENCES["fp8_quant_per_token"](x, dtype)
    return codes, scale


def _norm_fake(x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    _check_norm("rms_norm", x, residual, weight, epsilon)
    return x.new_empty(x.shape), _sum_like(x, residual)


def _norm_reference(x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    _check_norm("rms_norm", x, residual, weight, epsilon)
    summed = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    wide = summed.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon) * weight.float()
    return wide.to(x.dtype), x.new_empty((0,)) if residual is None else summed


def _norm_quant_fake(
    x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    _check_norm("rms_norm_quant", x, residual, weight, epsilon)
    _check_codes("rms_norm_quant", x, dtype)
    return *_codes_like(x, dtype), _sum_like(x, residual)


def _norm_quant_reference(
    x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    _check_norm("rms_norm_quant", x, residual, weight, epsilon)
    _check_codes("rms_norm_quant", x, dtype)
    out, summed = _norm_reference(x, residual, weight, epsilon)
    return *_quantized(out, dtype), summed


def _check_gate(op: str, gate: Tensor, up: Tensor) -> None:
    _check_tokens(op, "gate", gate)
    _check_like(op, "up", up, "gate", gate)


def _silu_fake(gate: Tensor, up: Tensor) -> Tensor:
    _check_gate("silu_mul", gate, up)
    return gate.new_empty(gate.shape)


def _silu_reference(gate: Tensor, up: Tensor) -> Tensor:
    _check_gate("silu_mul", gate, up)
    wide = gate.float()
    return (wide / (1 + torch.exp(-wide)) * up.float()).to(gate.dtype)


def _silu_quant_fake(gate: Tensor, up: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    _check_gate("silu_mul_quant", gate, up)
    _check_codes("silu_mul_quant", gate, dtype)
    return _codes_like(gate, dtype)


def _silu_quant_reference(gate: Tensor, up: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    _check_gate("silu_mul_quant", gate, up)
    _check_codes("silu_mul_quant", gate, dtype)
    return _quantized(_silu_reference(gate, up), dtype)


def _check_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    op = "rotary_embedding"
    torch._check(x.dim() == 4, lambda: f"quantkit::{op}: x must be 4-D [batch, heads, tokens, size], got {x.dim()}-D")
    check_float(op, "x", x)
    torch._check(
        cos.dim() == 3
        and cos.dtype == x.dtype
        and cos.shape[0] in (1, x.shape[0])
        and cos.shape[1] == x.shape[2]
        and cos.shape[2] <= x.shape[3]
        and cos.shape[2] % 2 == 0,
        lambda: (
            f"quantkit::{op}: cos must be {x.dtype} [batch or 1, {x.shape[2]}, an even number up to {x.shape[3]}], "
            f"got {cos.dtype} {list(cos.shape)}"
        ),
    )
    _check_like(op, "sin", sin, "cos", cos)


def _rotary_fake(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    _check_rotary(x, cos, sin)
    batch, heads, tokens, size = x.shape
    return x.new_empty((batch, tokens, heads, size)).transpose(1, 2)


def _rotary_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    _check_rotary(x, cos, sin)
    turned = cos.shape[2]
    wide = x[..., :turned].float()
    first, second = wide.chunk(2, -1)
    out = wide * cos.float()[:, None] + torch.cat((-second, first), -1) * sin.float()[:, None]
    whole = torch.cat((out.to(x.dtype), x[..., turned:]), -1)
    return whole.transpose(1, 2).contiguous().transpose(1, 2)


_norm = declare(
    "rms_norm(Tensor x, Tensor? residual, Tensor weight, float epsilon) -> (Tensor, Tensor)",
    fake=_norm_fake,
    reference=_norm_reference,
)
_norm_quant = declare(
    "rms_norm_quant(Tensor x, Tensor? residual, Tensor weight, float epsilon, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_norm_quant_fake,
    reference=_norm_quant_reference,
)
_silu = declare("silu_mul(Tensor gate, Tensor up) -> Tensor", fake=_silu_fake, reference=_silu_reference)
_silu_quant = declare(
    "silu_mul_quant(Tensor gate, Tensor up, ScalarType dtype) -> (Tensor, Tensor)",
    fake=_silu_quant_fake,
    reference=_silu_quant_reference,
)
_rotary = declare(
    "rotary_embedding(Tensor x, Tensor cos, Tensor sin) -> Tensor",
    fake=_rotary_fake,
    reference=_rotary_reference,
)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dimension, in fp32, rounded once to x's dtype (RMSNorm,
    Zhang and Sennrich 2019). x [..., K] fp32, fp16 or bf16, rows with any strides; weight [K] of x's dtype.
    """
    return _norm(x, None, weight, epsilon)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """`rms_norm` of x + residual (rounded to x's dtype), and that sum: (out, sum), each [..., K]."""
    return _norm(x, residual, weight, epsilon)


def rms_norm_quant(
    x: Tensor, weight: Tensor, epsilon: float, *, residual: Tensor | None = None, dtype: torch.dtype = torch.int8
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(codes, scale, sum): `rms_norm`'s result quantized per token, exactly as `int8_quant_per_token` (symmetric) or
    `fp8_quant_per_token` would. codes [..., K] int8, float8_e4m3fn or float8_e5m2; scale fp32 [..., 1]; sum = x +
    residual, None without a residual.
    """
    codes, scale, summed = _norm_quant(x, residual, weight, epsilon, dtype)
    return codes, scale, None if residual is None else summed


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """gate / (1 + exp(-gate)) * up in fp32, rounded once to gate's dtype: [..., K] from two of that shape and dtype,
    rows with any strides (the halves of one tensor, say). Finite for finite input unless the product is too large.
    """
    return _silu(gate, up)


def silu_mul_quant(gate: Tensor, up: Tensor, *, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """(codes, scale): `silu_mul`'s result quantized per token, as in `rms_norm_quant`."""
    return _silu_quant(gate, up, dtype)


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [batch, heads, tokens, size] turned by position (RoPE, Su et al. 2021), in the order of halves that Llama's
    checkpoints have in Transformers: elements i and i + R/2 of a head are one pair. cos, sin [batch or 1, tokens, R] of
    x's dtype, R even; elements from R on stay. In fp32, rounded once; the result is a transposed [batch, tokens, heads,
    size].
    """
    return _rotary(x, cos, sin)
