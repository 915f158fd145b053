"""Quantize and dequantize with given scales, and dynamic per-token quantization of activations.

Codes are round-half-even of x * (1 / scale), with 1 / scale rounded to fp32: one multiplication per element.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._library import check_code_range, check_float, check_matrix, declare, expand, grid
from .reduce import _absmax_reference, _minmax_reference
from .scale import _asymmetric_reference, _symmetric_reference

FP8_MAX = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


def check_scale(op: str, x: Tensor, scale: Tensor, zero_point: Tensor | None, block: Sequence[int]) -> None:
    check_matrix(op, x, block)
    expected = grid(x.shape[0], x.shape[1], block)
    torch._check(
        tuple(scale.shape) == expected and scale.dtype == torch.float32,
        lambda: (
            f"quantkit::{op}: scale must be float32 {list(expected)} for x {list(x.shape)} and block {list(block)}, "
            f"got {scale.dtype} {list(scale.shape)}"
        ),
    )
    torch._check(
        zero_point is None or (zero_point.shape == scale.shape and zero_point.dtype == torch.int8),
        lambda: f"quantkit::{op}: zero_point must be int8 with scale's shape {list(scale.shape)}",
    )


def _check_fp8(op: str, dtype: torch.dtype) -> None:
    torch._check(dtype in FP8_MAX, lambda: f"quantkit::{op}: dtype must be float8_e4m3fn or float8_e5m2, got {dtype}")


def check_quantized(op: str, name: str, q: Tensor) -> None:
    torch._check(
        q.dtype == torch.int8 or q.dtype in FP8_MAX,
        lambda: f"quantkit::{op}: {name} must be int8, float8_e4m3fn or float8_e5m2, got {q.dtype}",
    )


def _quantize_int_fake(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, block: Sequence[int], q_min: int, q_max: int
) -> Tensor:
    check_scale("quantize_int", x, scale, zero_point, block)
    check_float("quantize_int", "x", x)
    check_code_range("quantize_int", q_min, q_max)
    return x.new_empty(x.shape, dtype=torch.int8)


def _quantize_int_reference(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, block: Sequence[int], q_min: int, q_max: int
) -> Tensor:
    check_scale("quantize_int", x, scale, zero_point, block)
    check_float("quantize_int", "x", x)
    check_code_range("quantize_int", q_min, q_max)
    rows, cols = x.shape
    codes = torch.round(x.float() * expand(1.0 / scale, rows, cols, block)).nan_to_num(nan=0.0)
    if zero_point is not None:
        codes = codes + expand(zero_point.float(), rows, cols, block)
    return codes.clamp(q_min, q_max).to(torch.int8).contiguous()


def _quantize_fp8_fake(x: Tensor, scale: Tensor, block: Sequence[int], dtype: torch.dtype) -> Tensor:
    check_scale("quantize_fp8", x, scale, None, block)
    check_float("quantize_fp8", "x", x)
    _check_fp8("quantize_fp8", dtype)
    return x.new_empty(x.shape, dtype=dtype)


def _quantize_fp8_reference(x: Tensor, scale: Tensor, block: Sequence[int], dtype: torch.dtype) -> Tensor:
    check_scale("quantize_fp8", x, scale, None, block)
    check_float("quantize_fp8", "x", x)
    _check_fp8("quantize_fp8", dtype)
    limit = FP8_MAX[dtype]
    scaled = x.float() * expand(1.0 / scale, x.shape[0], x.shape[1], block)
    return scaled.clamp(-limit, limit).to(dtype).contiguous()


def _check_dequantize(
    q: Tensor, scale: Tensor, zero_point: Tensor | None, block: Sequence[int], dtype: torch.dtype
) -> None:
    check_scale("dequantize", q, scale, zero_point, block)
    check_quantized("dequantize", "q", q)
    torch._check(
        dtype in (torch.float32, torch.float16, torch.bfloat16),
        lambda: f"quantkit::dequantize: dtype must be float32, float16 or bfloat16, got {dtype}",
    )


def _dequantize_fake(
    q: Tensor, scale: Tensor, zero_point: Tensor | None, block: Sequence[int], dtype: torch.dtype
) -> Tensor:
    _check_dequantize(q, scale, zero_point, block, dtype)
    return q.new_empty(q.shape, dtype=dtype)


def _dequantize_reference(
    q: Tensor, scale: Tensor, zero_point: Tensor | None, block: Sequence[int], dtype: torch.dtype
) -> Tensor:
    _check_dequantize(q, scale, zero_point, block, dtype)
    values = q.float()
    if zero_point is not None:
        values = values - expand(zero_point.float(), q.shape[0], q.shape[1], block)
    return (values * expand(scale, q.shape[0], q.shape[1], block)).to(dtype).contiguous()


def _check_tokens(op: str, x: Tensor) -> None:
    torch._check(x.dim() >= 1, lambda: f"quantkit::{op}: x must have at least one dimension")
    check_float(op, "x", x)


def _token_rows(x: Tensor) -> Tensor:
    """x [..., cols] as a matrix. A token without elements counts as a zero, so that its scale is the smallest one."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows if x.shape[-1] else rows.new_zeros((rows.shape[0], 1))


def _int8_per_token_fake(x: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    _check_tokens("int8_quant_per_token", x)
    shape = (*x.shape[:-1], 1)
    zero_point = x.new_empty((0,) if symmetric else shape, dtype=torch.int8)
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(shape, dtype=torch.float32), zero_point


def _int8_per_token_reference(x: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    _check_tokens("int8_quant_per_token", x)
    rows, shape, block = _token_rows(x), (*x.shape[:-1], 1), [1, -1]
    if symmetric:
        scale, zero_point = _symmetric_reference(_absmax_reference(rows, block), 127.0, torch.float32), None
    else:
        scale, zero_point = _asymmetric_reference(*_minmax_reference(rows, block), -128, 127, torch.float32)
    codes = _quantize_int_reference(rows, scale, zero_point, block, -127 if symmetric else -128, 127)
    codes = codes[:, : x.shape[-1]].reshape(x.shape)
    if zero_point is None:
        return codes, scale.reshape(shape), x.new_empty((0,), dtype=torch.int8)
    return codes, scale.reshape(shape), zero_point.reshape(shape)


def _fp8_per_token_fake(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    _check_tokens("fp8_quant_per_token", x)
    _check_fp8("fp8_quant_per_token", dtype)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _fp8_per_token_reference(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    _check_tokens("fp8_quant_per_token", x)
    _check_fp8("fp8_quant_per_token", dtype)
    rows, block = _token_rows(x), [1, -1]
    scale = _symmetric_reference(_absmax_reference(rows, block), FP8_MAX[dtype], torch.float32)
    codes = _quantize_fp8_reference(rows, scale, block, dtype)
    return codes[:, : x.shape[-1]].reshape(x.shape), scale.reshape((*x.shape[:-1], 1))


_quantize_int = declare(
    "quantize_int(Tensor x, Tensor scale, Tensor? zero_point, int[] block, int q_min, int q_max) -> Tensor",
    fake=_quantize_int_fake,
    reference=_quantize_int_reference,
)
_quantize_fp8 = declare(
    "quantize_fp8(Tensor x, Tensor scale, int[] block, ScalarType dtype) -> Tensor",
    fake=_quantize_fp8_fake,
    reference=_quantize_fp8_reference,
)
_dequantize = declare(
    "dequantize(Tensor q, Tensor scale, Tensor? zero_point, int[] block, ScalarType dtype) -> Tensor",
    fake=_dequantize_fake,
    reference=_dequantize_reference,
)
_int8_per_token = declare(
    "int8_quant_per_token(Tensor x, bool symmetric) -> (Tensor, Tensor, Tensor)",
    fake=_int8_per_token_fake,
    reference=_int8_per_token_reference,
)
_fp8_per_token = declare(
    "fp8_quant_per_token(Tensor x, ScalarType dtype) -> (Tensor, Tensor)",
    fake=_fp8_per_token_fake,
    reference=_fp8_per_token_reference,
)


def quantize_int(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, block: Sequence[int], q_min: int, q_max: int
) -> Tensor:
    """int8 codes clamp(round(x / scale) + zero_point, q_min, q_max). x [rows, cols]; scale fp32, zero_point int8 of
    the grid that `block` gives. NaN becomes the code of zero: callers that must not lose a NaN look at the scale.
    """
    return _quantize_int(x, scale, zero_point, list(block), q_min, q_max)


def quantize_fp8(x: Tensor, scale: Tensor, block: Sequence[int], dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """FP8 of x / scale: saturating, round to nearest even, NaN kept. x [rows, cols]; scale fp32 of `block`'s grid."""
    return _quantize_fp8(x, scale, list(block), dtype)


def dequantize(
    q: Tensor, scale: Tensor, zero_point: Tensor | None, block: Sequence[int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """(q - zero_point) * scale in fp32, then rounded to `dtype`. q int8 or FP8 [rows, cols]."""
    return _dequantize(q, scale, zero_point, list(block), dtype)


def int8_quant_per_token(x: Tensor, symmetric: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Dynamic int8: x [..., cols] -> int8 codes [..., cols], fp32 scale [..., 1], int8 zero point [..., 1].

    Symmetric codes lie in [-127, 127] and the zero point is empty; asymmetric ones in [-128, 127].
    """
    return _int8_per_token(x, symmetric)


def fp8_quant_per_token(x: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    """Dynamic FP8: x [..., cols] -> FP8 [..., cols] and fp32 scale [..., 1]."""
    return _fp8_per_token(x, dtype)
