"""MX and NVFP4: codes whose scales neighbours share and that are floats themselves. For weights, and for activations at
run time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import ops

if TYPE_CHECKING:
    from .config.schemes import QuantizationArgs

FP8 = torch.float8_e4m3fn


def fit(
    x: Tensor, amax: Tensor, args: QuantizationArgs, global_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales (fp32 [rows, groups]) and NVFP4's global scale (fp32 [1], else None) of x [rows, cols] in MX or
    NVFP4; amax: the largest magnitudes of its groups.
    """
    if args.scales == "nvfp4":
        if global_scale is None:
            global_scale = ops.nvfp4_global_scale(amax.amax() if amax.numel() else amax.new_zeros(1))
        scale = ops.nvfp4_scale(amax, global_scale)
    else:
        global_scale, scale = None, ops.e8m0_scale(amax, args.num_bits)
    if args.fp4:
        return ops.quantize_fp4(x, scale, args.block[1]), scale, global_scale
    return ops.quantize_fp8(x, scale, args.block, FP8), scale, global_scale


def rounded(x: Tensor, args: QuantizationArgs, global_scale: Tensor | None) -> Tensor:
    """x [rows, cols] as its codes hold it, in x's dtype. `global_scale`: fp32, one number, of NVFP4 alone."""
    if global_scale is not None:
        global_scale = global_scale.reshape(1).to(x.device)
    codes, scale, _ = fit(x, ops.absmax(x, args.block), args, global_scale)
    return ops.dequantize(ops.unpack_fp4(codes) if args.fp4 else codes, scale, None, args.block, x.dtype)
