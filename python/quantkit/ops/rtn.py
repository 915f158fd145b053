"""Round-to-nearest in one fused pass: weight -> scale -> codes -> packed words, so that a weight is read once.

The results are those of `absmax` / `minmax`, `symmetric_scale` / `asymmetric_scale`, `quantize_*` and `pack_int32`
one after the other, bit for bit; the reference is just that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._library import check_code_range, check_float, check_matrix, declare, grid
from .pack import _pack_reference
from .quantize import FP8_MAX, _check_fp8, _quantize_fp8_reference, _quantize_int_reference
from .reduce import _absmax_reference, _minmax_reference
from .scale import _asymmetric_reference, _check_scale_dtype, _symmetric_reference


def _check_rtn_int(x: Tensor, block: Sequence[int], q_min: int, q_max: int, pack_bits: int) -> None:
    check_matrix("rtn_int", x, block)
    check_float("rtn_int", "x", x)
    check_code_range("rtn_int", q_min, q_max)
    torch._check(pack_bits in (0, 4, 8), lambda: f"quantkit::rtn_int: pack_bits must be 0, 4 or 8, got {pack_bits}")


def _rtn_int_fake(
    x: Tensor,
    block: Sequence[int],
    q_min: int,
    q_max: int,
    symmetric: bool,
    divisor: float,
    scale_dtype: torch.dtype,
    pack_bits: int,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_rtn_int(x, block, q_min, q_max, pack_bits)
    _check_scale_dtype("rtn_int", scale_dtype)
    rows, cols = x.shape
    shape = grid(rows, cols, block)
    if pack_bits:
        q = x.new_empty((rows, (cols * pack_bits + 31) // 32), dtype=torch.int32)
    else:
        q = x.new_empty((rows, cols), dtype=torch.int8)
    zero_point = x.new_empty((0,) if symmetric else shape, dtype=torch.int8)
    return q, x.new_empty(shape, dtype=torch.float32), zero_point


def _rtn_int_reference(
    x: Tensor,
    block: Sequence[int],
    q_min: int,
    q_max: int,
    symmetric: bool,
    divisor: float,
    scale_dtype: torch.dtype,
    pack_bits: int,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_rtn_int(x, block, q_min, q_max, pack_bits)
    _check_scale_dtype("rtn_int", scale_dtype)
    if symmetric:
        scale, zero_point = _symmetric_reference(_absmax_reference(x, block), divisor, scale_dtype), None
    else:
        scale, zero_point = _asymmetric_reference(*_minmax_reference(x, block), q_min, q_max, scale_dtype)
    q = _quantize_int_reference(x, scale, zero_point, block, q_min, q_max)
    if pack_bits:
        q = _pack_reference(q, pack_bits)
    return q, scale, x.new_empty((0,), dtype=torch.int8) if zero_point is None else zero_point


def _rtn_fp8_fake(x: Tensor, block: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    check_matrix("rtn_fp8", x, block)
    check_float("rtn_fp8", "x", x)
    _check_fp8("rtn_fp8", dtype)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(grid(x.shape[0], x.shape[1], block), dtype=torch.float32)


def _rtn_fp8_reference(x: Tensor, block: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    check_matrix("rtn_fp8", x, block)
    check_float("rtn_fp8", "x", x)
    _check_fp8("rtn_fp8", dtype)
    scale = _symmetric_reference(_absmax_reference(x, block), FP8_MAX[dtype], torch.float32)
    return _quantize_fp8_reference(x, scale, block, dtype), scale


_rtn_int = declare(
    "rtn_int(Tensor x, int[] block, int q_min, int q_max, bool symmetric, float divisor, ScalarType scale_dtype, "
    "int pack_bits) -> (Tensor, Tensor, Tensor)",
    fake=_rtn_int_fake,
    reference=_rtn_int_reference,
)
_rtn_fp8 = declare(
    "rtn_fp8(Tensor x, int[] block, ScalarType dtype) -> (Tensor, Tensor)",
    fake=_rtn_fp8_fake,
    reference=_rtn_fp8_reference,
)


def rtn_int(
    x: Tensor,
    block: Sequence[int],
    *,
    q_min: int,
    q_max: int,
    symmetric: bool = True,
    divisor: float = 0.0,
    scale_dtype: torch.dtype = torch.float32,
    pack_bits: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zero points of x [rows, cols] (fp32, fp16, bf16) by rounding to nearest.

    Gives int8 codes [rows, cols] (`pack_bits` 0) or int32 words as `pack_int32`; scale fp32 of `block`'s grid, rounded
    to `scale_dtype`; int8 zero points of that grid, empty if symmetric. `divisor` is used for symmetric scales only.
    """
    return _rtn_int(x, list(block), q_min, q_max, symmetric, divisor, scale_dtype, pack_bits)


def rtn_fp8(x: Tensor, block: Sequence[int], dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    """FP8 codes [rows, cols] and fp32 scales of `block`'s grid, scale = absmax / 448 (57344 for e5m2)."""
    return _rtn_fp8(x, list(block), dtype)
