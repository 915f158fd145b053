"""What a modifier hands to a format: a Linear's weight as integer, FP8 or FP4 codes with their scales."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .config.schemes import QuantizationArgs


@dataclass(frozen=True)
class QuantizedTensor:
    """codes: int8 or FP8 [rows, cols], or, when `packed`, int32 words (FP4: bytes of two); scale fp32 [grid rows, grid
    cols]; zero_point int8 of the scale's shape, None if symmetric. `args` says what the codes mean. `g_idx`: int32
    [cols], the group of each column, where groups are not runs of neighbours (actorder "group"). `global_scale`: fp32
    [1], what NVFP4's stored scales are divided by; `scale` is the quotient. `rows` are those of the weight, also where
    codes, scale and zero_point are of some of them (`part`).
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    args: QuantizationArgs
    rows: int
    cols: int
    packed: bool = False
    g_idx: Tensor | None = None
    global_scale: Tensor | None = None

    def runs(self) -> Tensor:
        """int64 [cols]: the group of each column where groups are runs of neighbours."""
        import torch

        return torch.arange(self.cols) // (self.args.group_size or self.cols)

    def part(self, begin: int, end: int) -> QuantizedTensor:
        """Rows [begin, end) as views; `begin` is the first row of a block."""
        size = self.args.block[0]
        grid = slice(None) if size == -1 else slice(begin // size, -(-end // size))
        zero_point = None if self.zero_point is None else self.zero_point[grid]
        return replace(self, codes=self.codes[begin:end], scale=self.scale[grid], zero_point=zero_point)

    def unpacked(self) -> Tensor:
        """The codes as int8 or FP8 [rows, cols]; FP4's values are FP8's too."""
        from . import ops

        if self.packed and self.args.fp4:
            return ops.unpack_fp4(self.codes)
        return ops.unpack_int32(self.codes, self.args.num_bits, self.cols) if self.packed else self.codes

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """(codes - zero_point) * scale: [rows, cols] in `dtype` (fp32 unless given)."""
        import torch

        from . import ops

        dtype = dtype or torch.float32
        if self.g_idx is not None:
            index, codes = self.g_idx.long(), self.unpacked().to(torch.float32)
            if self.zero_point is not None:
                codes -= self.zero_point[:, index]
            return (codes * self.scale[:, index]).to(dtype)
        return ops.dequantize(self.unpacked(), self.scale, self.zero_point, self.args.block, dtype)
