"""FP4 (e2m1) codes, two in a byte, and the scales of the formats that share one among 16 or 32 neighbours.

A code is sign << 3 | index into 0, 0.5, 1, 1.5, 2, 3, 4, 6; the even column is in the lower nibble. e4m3 holds all of
these values, so that what runs on e4m3 codes runs on them too. Codes are round-half-even of x / scale, a division.

MX (OCP Microscaling 1.0): groups of 32, scales are powers of two, stored as e8m0 (exponent + 127). NVFP4: groups of 16,
scales are e4m3 numbers divided by one fp32 number for the whole tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import check_float, declare, expand
from .quantize import FP8_MAX, check_scale

FP4_MAX = 6.0
E4M3_MAX = FP8_MAX[torch.float8_e4m3fn]
# The e4m3 codes of the sixteen values.
_AS_E4M3 = (0x00, 0x30, 0x38, 0x3C, 0x40, 0x44, 0x48, 0x4C, 0x80, 0xB0, 0xB8, 0xBC, 0xC0, 0xC4, 0xC8, 0xCC)
_ELEMENT_EXPONENT = {4: 2, 8: 8}  # floor(log2) of the largest e2m1 and e4m3 number
_LEAST_E4M3 = 2.0**-9


def _check(x: Tensor, scale: Tensor, group_size: int) -> None:
    torch._check(
        group_size > 0 and group_size % 2 == 0,
        lambda: f"quantkit::quantize_fp4: group_size must be positive and even, got {group_size}",
    )
    check_scale("quantize_fp4", x, scale, None, [1, group_size])
    check_float("quantize_fp4", "x", x)
    torch._check(
        x.shape[1] % 2 == 0,
        lambda: f"quantkit::quantize_fp4: x must have an even number of columns, got {x.shape[1]}",
    )


def _quantize_fake(x: Tensor, scale: Tensor, group_size: int) -> Tensor:
    _check(x, scale, group_size)
    return x.new_empty((x.shape[0], x.shape[1] // 2), dtype=torch.uint8)


def _quantize_reference(x: Tensor, scale: Tensor, group_size: int) -> Tensor:
    _check(x, scale, group_size)
    rows, cols = x.shape
    scaled = (x.float() / expand(scale, rows, cols, [1, group_size])).nan_to_num(nan=0.0)
    size = scaled.abs()
    # Ties go to the value with an even index.
    code = (scaled < 0).to(torch.uint8) << 3
    for bound, even_above in ((0.25, 0), (0.75, 1), (1.25, 0), (1.75, 1), (2.5, 0), (3.5, 1), (5.0, 0)):
        code = code + (size >= bound if even_above else size > bound).to(torch.uint8)
    return (code[:, ::2] | code[:, 1::2] << 4).contiguous()


def _unpack_fake(packed: Tensor) -> Tensor:
    torch._check(
        packed.dim() == 2 and packed.dtype == torch.uint8,
        lambda: f"quantkit::unpack_fp4: packed must be 2-D torch.uint8, got {packed.dim()}-D {packed.dtype}",
    )
    return packed.new_empty((packed.shape[0], 2 * packed.shape[1]), dtype=torch.float8_e4m3fn)


def _unpack_reference(packed: Tensor) -> Tensor:
    _unpack_fake(packed)
    table = torch.tensor(_AS_E4M3, dtype=torch.uint8, device=packed.device)
    pairs = torch.stack((table[(packed & 15).long()], table[(packed >> 4).long()]), -1)
    return pairs.reshape(packed.shape[0], 2 * packed.shape[1]).view(torch.float8_e4m3fn)


_quantize = declare(
    "quantize_fp4(Tensor x, Tensor scale, int group_size) -> Tensor",
    fake=_quantize_fake,
    reference=_quantize_reference,
)
_unpack = declare("unpack_fp4(Tensor packed) -> Tensor", fake=_unpack_fake, reference=_unpack_reference)


def quantize_fp4(x: Tensor, scale: Tensor, group_size: int) -> Tensor:
    """FP4 of x / scale, two codes in a byte: x [rows, cols] (fp32, fp16, bf16; cols even), scale fp32 [rows, ceil(cols
    / group_size)] -> uint8 [rows, cols / 2]. Saturates; NaN becomes zero: callers that must not lose one look at the
    scale.
    """
    return _quantize(x, scale, group_size)


def unpack_fp4(packed: Tensor) -> Tensor:
    """The values behind uint8 [rows, cols / 2]: float8_e4m3fn [rows, cols], exactly."""
    return _unpack(packed)


def e8m0_scale(amax: Tensor, num_bits: int) -> Tensor:
    """MX scales, fp32 powers of two of amax's shape, for elements of e2m1 (`num_bits` 4) or e4m3 (8). amax: fp32, the
    largest magnitude of each group.

    That of amax, less the exponent of the format's largest element; a mantissa of 1.75 and more counts as 2, for else
    the largest elements would be cut off. Zero gives the smallest scale, 2^-127; NaN and infinity stay.
    """
    mantissa, exponent = torch.frexp(amax)  # mantissa in [0.5, 1)
    exponent = exponent + (mantissa >= 0.875).to(exponent.dtype) - 1 - _ELEMENT_EXPONENT[num_bits]
    exponent = torch.where(amax == 0, -127, exponent.clamp(-127, 127))
    return torch.where(amax.isfinite(), e8m0_decode((exponent + 127).to(torch.uint8)), amax)


def e8m0_encode(scale: Tensor) -> Tensor:
    """The bytes, exponent + 127, of fp32 powers of two from 2^-127 on: uint8 of their shape."""
    return (torch.frexp(scale).exponent + 126).to(torch.uint8)


def e8m0_decode(codes: Tensor) -> Tensor:
    """fp32 of e8m0 bytes; 255 is NaN."""
    value = torch.ldexp(torch.ones_like(codes, dtype=torch.float32), codes.to(torch.int32) - 127)
    return value.masked_fill(codes == 255, torch.nan)


def nvfp4_global_scale(amax: Tensor) -> Tensor:
    """The number that NVFP4's local scales are divided by: 448 * 6 / amax, fp32 [1], so that the largest becomes the
    largest e4m3 number. amax: fp32, the largest magnitude of all (Linears that servers fuse need one in common). 1
    where it is zero.
    """
    scale = (E4M3_MAX * FP4_MAX) / amax.reshape(1).float()
    return scale.nan_to_num(nan=torch.nan, posinf=1.0)


def nvfp4_scale(amax: Tensor, global_scale: Tensor) -> Tensor:
    """NVFP4 scales of groups with the largest magnitudes amax, fp32: e4m3(amax / 6 * global) / global, of amax's shape.
    None is smaller than the least e4m3 number.
    """
    local = (global_scale * (amax / FP4_MAX)).clamp(_LEAST_E4M3, E4M3_MAX)
    return local.to(torch.float8_e4m3fn).float() / global_scale


def nvfp4_local(scale: Tensor, global_scale: Tensor) -> Tensor:
    """The e4m3 number behind each of `nvfp4_scale`'s results."""
    return (scale * global_scale).to(torch.float8_e4m3fn)
