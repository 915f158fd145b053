"""Round to nearest: each element goes to the nearest code; scales are the weight's own range, or searched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..config.schemes import QuantizationArgs
from ..microscale import fit
from ..quantized import QuantizedTensor
from ..rounding import not_finite

FP8 = torch.float8_e4m3fn


def quantize_weight(
    name: str,
    weight: Tensor,
    args: QuantizationArgs,
    *,
    scale_dtype: torch.dtype,
    pack: bool,
    importance: Tensor | None = None,
    global_scale: Tensor | None = None,
) -> QuantizedTensor:
    """Quantize `weight` [rows, cols] (fp32, fp16, bf16) as `args` say.

    `scale_dtype` is what the format stores scales in; they are rounded to it before codes are computed. `pack` gives
    int32 words instead of int8 codes. `importance` (fp32 [cols]) weighs columns where the observer searches.
    `global_scale` (fp32 [1]): NVFP4's, where others share it; the weight's own unless given. Raises CheckpointError
    naming the rows if the weight has NaN or Inf.
    """
    rows, cols = weight.shape
    zero_point: Tensor | None = None
    if args.scales != "float":
        amax = ops.absmax(weight, args.block)
        check_finite(name, weight, amax)
        codes, scale, global_scale = fit(weight, amax, args, global_scale)
        return QuantizedTensor(codes, scale, None, args, rows, cols, args.fp4, global_scale=global_scale)
    if args.type == "float":
        codes, scale = ops.rtn_fp8(weight, args.block, FP8)
    elif args.observer in ("mse", "percentile"):
        scale, zero_point = weight_scale(name, weight, args, scale_dtype=scale_dtype, importance=importance)
        codes = ops.quantize_int(weight, scale, zero_point, args.block, *args.q_range)
        codes = ops.pack_int32(codes, args.num_bits) if pack else codes
    else:
        q_min, q_max = args.q_range
        codes, scale, zero_point = ops.rtn_int(
            weight,
            args.block,
            q_min=q_min,
            q_max=q_max,
            symmetric=args.symmetric,
            divisor=args.divisor,
            scale_dtype=scale_dtype,
            pack_bits=args.num_bits if pack else 0,
        )
    check_finite(name, weight, scale)
    return QuantizedTensor(codes, scale, None if args.symmetric else zero_point, args, rows, cols, pack)


def weight_scale(
    name: str,
    weight: Tensor,
    args: QuantizationArgs,
    *,
    scale_dtype: torch.dtype,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Scale (fp32 [grid rows, grid cols]) and zero point (int8, None if symmetric) of integer codes for `weight`, as
    `args.observer` finds them: from the range (minmax), by least error (mse) or from a percentile of it.
    """
    q_min, q_max = args.q_range
    common: dict[str, Any] = {"q_min": q_min, "q_max": q_max, "symmetric": args.symmetric, "divisor": args.divisor}
    options: dict[str, Any] = dict(args.observer_kwargs)
    if args.observer in ("mse", "percentile"):  # the searches refuse such weights, without their names
        check_finite(name, weight, ops.absmax(weight, args.block))
    zero_point: Tensor | None = None
    if args.observer == "mse":
        scale, zero_point = ops.mse_scale(
            weight, args.block, importance=importance, scale_dtype=scale_dtype, **common, **options
        )
    elif args.observer == "percentile":
        scale, zero_point = ops.percentile_scale(weight, args.block, scale_dtype=scale_dtype, **common, **options)
    elif args.symmetric:
        scale = ops.symmetric_scale(ops.absmax(weight, args.block), args.divisor, scale_dtype)
    else:
        scale, zero_point = ops.asymmetric_scale(*ops.minmax(weight, args.block), q_min, q_max, scale_dtype)
    check_finite(name, weight, scale)
    return scale, None if args.symmetric else zero_point


def check_finite(name: str, weight: Tensor, scale: Tensor) -> None:
    """A NaN or Inf anywhere in a weight shows in the scale of its block; the row is looked up only then."""
    if bool(torch.isfinite(scale).all()):
        return
    bad = (~torch.isfinite(weight.float()).all(dim=1)).nonzero().flatten().tolist()
    raise not_finite(name, bad, weight.shape[0])
