"""int4 and int8 codes in int32 words, as compressed-tensors' `pack-quantized` stores them.

A code q is stored as the unsigned number q + 2^(bits-1). Element i of a row sits in word i // (32 / bits) at bit
(i % (32 / bits)) * bits, so element 0 is in the lowest bits; what is left of the last word is zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import declare


def _check(op: str, x: Tensor, dtype: torch.dtype, num_bits: int) -> None:
    torch._check(num_bits in (4, 8), lambda: f"quantkit::{op}: num_bits must be 4 or 8, got {num_bits}")
    torch._check(
        x.dim() == 2 and x.dtype == dtype,
        lambda: f"quantkit::{op}: expected a 2-D {dtype} tensor, got {x.dim()}-D {x.dtype}",
    )


def _pack_fake(codes: Tensor, num_bits: int) -> Tensor:
    _check("pack_int32", codes, torch.int8, num_bits)
    return codes.new_empty((codes.shape[0], (codes.shape[1] * num_bits + 31) // 32), dtype=torch.int32)


def _pack_reference(codes: Tensor, num_bits: int) -> Tensor:
    _check("pack_int32", codes, torch.int8, num_bits)
    per_word = 32 // num_bits
    unsigned = (codes.to(torch.int64) + (1 << (num_bits - 1))) & ((1 << num_bits) - 1)
    padded = torch.nn.functional.pad(unsigned, (0, -codes.shape[1] % per_word))
    shifts = torch.arange(per_word, device=codes.device) * num_bits
    words = (padded.reshape(codes.shape[0], padded.shape[1] // per_word, per_word) << shifts).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _unpack_fake(packed: Tensor, num_bits: int, cols: int) -> Tensor:
    _check("unpack_int32", packed, torch.int32, num_bits)
    torch._check(
        packed.shape[1] == (cols * num_bits + 31) // 32,
        lambda: (
            f"quantkit::unpack_int32: {cols} columns of {num_bits} bits take {(cols * num_bits + 31) // 32} words "
            f"a row, packed has {packed.shape[1]}"
        ),
    )
    return packed.new_empty((packed.shape[0], cols), dtype=torch.int8)


def _unpack_reference(packed: Tensor, num_bits: int, cols: int) -> Tensor:
    _unpack_fake(packed, num_bits, cols)
    shifts = torch.arange(32 // num_bits, device=packed.device) * num_bits
    unsigned = (packed.to(torch.int64).unsqueeze(-1) >> shifts) & ((1 << num_bits) - 1)
    codes = unsigned.reshape(packed.shape[0], packed.shape[1] * (32 // num_bits))[:, :cols]
    return (codes - (1 << (num_bits - 1))).to(torch.int8).contiguous()


_pack = declare("pack_int32(Tensor codes, int num_bits) -> Tensor", fake=_pack_fake, reference=_pack_reference)
_unpack = declare(
    "unpack_int32(Tensor packed, int num_bits, int cols) -> Tensor", fake=_unpack_fake, reference=_unpack_reference
)


def pack_int32(codes: Tensor, num_bits: int) -> Tensor:
    """int8 codes [rows, cols] -> int32 words [rows, ceil(cols * num_bits / 32)]. Codes outside num_bits wrap."""
    return _pack(codes, num_bits)


def unpack_int32(packed: Tensor, num_bits: int, cols: int) -> Tensor:
    """The inverse of `pack_int32`: int32 words -> int8 codes [rows, cols]."""
    return _unpack(packed, num_bits, cols)


def pack_zero_points(zero_point: Tensor, num_bits: int) -> Tensor:
    """int8 zero points [rows, groups] -> int32 [ceil(rows * num_bits / 32), groups]: packed along the rows."""
    return pack_int32(zero_point.t().contiguous(), num_bits).t().contiguous()


def unpack_zero_points(packed: Tensor, num_bits: int, rows: int) -> Tensor:
    """The inverse of `pack_zero_points`: int8 [rows, groups]."""
    return unpack_int32(packed.t().contiguous(), num_bits, rows).t().contiguous()
