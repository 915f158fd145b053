"""Reductions for scale computation: absmax and min/max over blocks of a matrix.

Every granularity is a block shape `[rows, cols]`, -1 meaning the whole extent: tensor [-1, -1], channel or
token [1, -1], group [1, g], block [r, c], input channel [-1, 1]. NaN propagates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._library import check_float, check_matrix, declare, grid


def _blocked(x: Tensor, block: Sequence[int], fill: float) -> Tensor:
    """x as [grid rows, grid cols, elements of a block] in fp32, ragged edges filled."""
    rows, cols = x.shape
    grid_rows, grid_cols = grid(rows, cols, block)
    block_rows, block_cols = (rows if block[0] == -1 else block[0], cols if block[1] == -1 else block[1])
    padded = torch.nn.functional.pad(
        x.float(), (0, grid_cols * block_cols - cols, 0, grid_rows * block_rows - rows), value=fill
    )
    return (
        padded.reshape(grid_rows, block_rows, grid_cols, block_cols).transpose(1, 2).reshape(grid_rows, grid_cols, -1)
    )


def _absmax_fake(x: Tensor, block: Sequence[int]) -> Tensor:
    check_matrix("absmax", x, block)
    check_float("absmax", "x", x)
    return x.new_empty(grid(x.shape[0], x.shape[1], block), dtype=torch.float32)


def _absmax_reference(x: Tensor, block: Sequence[int]) -> Tensor:
    check_matrix("absmax", x, block)
    check_float("absmax", "x", x)
    if x.numel() == 0:
        return x.new_zeros(grid(x.shape[0], x.shape[1], block), dtype=torch.float32)
    return _blocked(x, block, 0.0).abs().amax(-1)


def _minmax_fake(x: Tensor, block: Sequence[int]) -> tuple[Tensor, Tensor]:
    check_matrix("minmax", x, block)
    check_float("minmax", "x", x)
    shape = grid(x.shape[0], x.shape[1], block)
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.float32)


def _minmax_reference(x: Tensor, block: Sequence[int]) -> tuple[Tensor, Tensor]:
    check_matrix("minmax", x, block)
    check_float("minmax", "x", x)
    if x.numel() == 0:
        zeros = x.new_zeros(grid(x.shape[0], x.shape[1], block), dtype=torch.float32)
        return zeros, zeros.clone()
    return _blocked(x, block, float("inf")).amin(-1), _blocked(x, block, float("-inf")).amax(-1)


_absmax = declare("absmax(Tensor x, int[] block) -> Tensor", fake=_absmax_fake, reference=_absmax_reference)
_minmax = declare("minmax(Tensor x, int[] block) -> (Tensor, Tensor)", fake=_minmax_fake, reference=_minmax_reference)


def absmax(x: Tensor, block: Sequence[int]) -> Tensor:
    """Largest |x| of each block. x [rows, cols] fp32, fp16 or bf16 -> fp32 [grid rows, grid cols]."""
    return _absmax(x, list(block))


def minmax(x: Tensor, block: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Smallest and largest x of each block. x [rows, cols] fp32, fp16 or bf16 -> two of fp32 [grid rows, grid cols]."""
    return _minmax(x, list(block))
