"""How vLLM's and sgl-kernel's weight-only formats lie in memory, and the way from there to `ops.pack_wna16`.

Words hold `32 / bits` unsigned codes, the first in the lowest bits. GPTQ's run along K, AWQ's along N in the order 0,
2, 4, 6, 1, 3, 5, 7. All permutations here are transpositions of small grids, which need no tables.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit import ops


def unpack_cols(words: Tensor, bits: int) -> Tensor:
    """int32 [R, C] -> unsigned codes int32 [R, C * 32 / bits]."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    return ((words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2)


def in_order(codes: Tensor, bits: int) -> Tensor:
    """The columns of AWQ's words, or of Marlin's zero points, as they follow each other."""
    half = 16 // bits
    return codes.unflatten(-1, (-1, 2, half)).transpose(-1, -2).flatten(-3)


def signed(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes [A, B] (or zero points) as int8 [B, A] in the signed range."""
    return (codes - (1 << (bits - 1))).to(torch.int8).t().contiguous()


def gptq_zero_points(qzeros: Tensor, bits: int, v2: bool) -> Tensor:
    """int8 [N, G]; the first version of the format stores them less one."""
    return signed(unpack_cols(qzeros, bits) + (0 if v2 else 1), bits)


def awq_zero_points(qzeros: Tensor, bits: int = 4) -> Tensor:
    return signed(in_order(unpack_cols(qzeros, bits), bits), bits)


def marlin_scales(scales: Tensor) -> Tensor:
    """[G, N] in Marlin's order of columns -> [N, G]."""
    groups, cols = scales.shape
    if groups > 1:
        return scales.reshape(groups, -1, 8, 8).transpose(2, 3).reshape(groups, cols).t().contiguous()
    return marlin_row(scales.reshape(-1)).reshape(cols, 1)


def marlin_row(values: Tensor) -> Tensor:
    """[N] (a bias, or one scale a channel) in Marlin's order of columns -> [N]."""
    return values.reshape(-1, 4, 4, 2).transpose(1, 2).reshape(-1)


def marlin_zero_points(zeros: Tensor, bits: int) -> Tensor:
    """int32 [G, N * bits / 32] as Marlin has them -> int8 [N, G]."""
    codes = in_order(unpack_cols(zeros, bits), bits)
    return signed(codes.reshape(len(codes), -1, 8, 8).transpose(2, 3).reshape(codes.shape), bits)


def pack_gptq(qweight: Tensor, bits: int, perm: Tensor | None) -> Tensor:
    """int32 [K * bits / 32, N]."""
    return ops.pack_wna16(qweight.t().contiguous(), bits, len(qweight) * 32 // bits, perm)


def pack_awq(qweight: Tensor, bits: int = 4) -> Tensor:
    """int32 [K, N * bits / 32]."""
    codes = signed(in_order(unpack_cols(qweight, bits), bits), bits)
    return ops.pack_wna16(ops.pack_int32(codes, bits), bits, codes.shape[1])


def pack_cpu(qweight: Tensor) -> Tensor:
    """vLLM's layout for CPUs, int32 [N / 16, K * 2]: 16 columns side by side, a word 8 of them."""
    blocks = qweight.reshape(len(qweight), -1, 2).transpose(0, 1).reshape(qweight.shape[1] // 2, -1)
    codes = signed(unpack_cols(blocks, 4), 4)
    return ops.pack_wna16(ops.pack_int32(codes, 4), 4, codes.shape[1])
