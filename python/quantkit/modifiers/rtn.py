"""Round to nearest: each element goes to the nearest code; scales are the weight's own range, or searched."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..config.schemes import QuantizationArgs
from ..errors import CheckpointError
from ..microscale import fit
from ..quantized import QuantizedTensor

FP8, FP8_MAX = torch.float8_e4m3fn, 448.0


def quantize_weight(
    name: str,
    weight: Tensor,
    args: QuantizationArgs,
    *,
    scale_dtype: torch.dtype,
    pack: bool,
    importance: Tensor | None = None,
    global_scale: Tensor | None = None,
    first: int = 0,
    of: int | None = None,
) -> QuantizedTensor:
    """Quantize `weight` [rows, cols] (fp32, fp16, bf16) as `args` say.

    `scale_dtype` is what the format stores scales in; they are rounded to it before codes are computed. `pack` gives
    int32 words instead of int8 codes. `importance` (fp32 [cols]) weighs columns where the observer searches.
    `global_scale` (fp32 [1]): NVFP4's, where others share it; the weight's own unless given. Raises CheckpointError
    naming the rows if the weight has NaN or Inf; counted from `first`, of `of`, if it is a part.
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
        scale, zero_point = weight_scale(
            name, weight, args, scale_dtype=scale_dtype, importance=importance, first=first, of=of
        )
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
    check_finite(name, weight, scale, first=first, of=of)
    return QuantizedTensor(codes, scale, None if args.symmetric else zero_point, args, rows, cols, pack)


def quantize_part(
    name: str,
    weight: Tensor,
    args: QuantizationArgs,
    rows: int,
    *,
    first: int,
    scale_dtype: torch.dtype,
    pack: bool,
    scale: tuple[Tensor, Tensor | None] | None = None,
) -> QuantizedTensor:
    """As `quantize_weight`, of the rows from `first` on of a weight with `rows` of them; they begin with a block. With
    strategy "tensor", `scale` is that of the whole weight (`tensor_scale`).
    """
    if scale is None:
        part = quantize_weight(name, weight, args, scale_dtype=scale_dtype, pack=pack, first=first, of=rows)
        return replace(part, rows=rows)
    if args.type == "float":
        codes = ops.quantize_fp8(weight, scale[0], args.block, FP8)
    else:
        codes = ops.quantize_int(weight, scale[0], scale[1], args.block, *args.q_range)
        codes = ops.pack_int32(codes, args.num_bits) if pack else codes
    return QuantizedTensor(codes, scale[0], scale[1], args, rows, weight.shape[1], pack)


def tensor_scale(
    name: str, parts: Iterable[tuple[int, Tensor]], args: QuantizationArgs, rows: int, *, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Scale (fp32 [1, 1]) and zero point (int8, None if symmetric) of a weight with strategy "tensor" and its own
    range, from its parts (first row, rows), each looked at once. The same as from all of it.
    """
    low: Tensor | None = None
    high: Tensor | None = None
    for first, part in parts:
        if args.symmetric:
            least = most = ops.absmax(part, args.block)
        else:
            least, most = ops.minmax(part, args.block)
        check_finite(name, part, most - least, first=first, of=rows)
        low = least if low is None else torch.minimum(low, least)
        high = most if high is None else torch.maximum(high, most)
    assert low is not None and high is not None
    if args.symmetric:
        divisor = FP8_MAX if args.type == "float" else args.divisor
        return ops.symmetric_scale(high, divisor, torch.float32 if args.type == "float" else scale_dtype), None
    return ops.asymmetric_scale(low, high, *args.q_range, scale_dtype)


def weight_scale(
    name: str,
    weight: Tensor,
    args: QuantizationArgs,
    *,
    scale_dtype: torch.dtype,
    importance: Tensor | None = None,
    first: int = 0,
    of: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Scale (fp32 [grid rows, grid cols]) and zero point (int8, None if symmetric) of integer codes for `weight`, as
    `args.observer` finds them: from the range (minmax), by least error (mse) or from a percentile of it.
    """
    q_min, q_max = args.q_range
    common: dict[str, Any] = {"q_min": q_min, "q_max": q_max, "symmetric": args.symmetric, "divisor": args.divisor}
    options: dict[str, Any] = dict(args.observer_kwargs)
    if args.observer in ("mse", "percentile"):  # the searches refuse such weights, without their names
        check_finite(name, weight, ops.absmax(weight, args.block), first=first, of=of)
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
    check_finite(name, weight, scale, first=first, of=of)
    return scale, None if args.symmetric else zero_point


def check_finite(name: str, weight: Tensor, scale: Tensor, *, first: int = 0, of: int | None = None) -> None:
    """A NaN or Inf anywhere in a weight shows in the scale of its block; the row is looked up only then. Rows count
    from `first`, of `of`, if it is a part of a weight.
    """
    if bool(torch.isfinite(scale).all()):
        return
    bad = (~torch.isfinite(weight.float()).all(dim=1)).nonzero().flatten().tolist()
    shown = ", ".join(str(first + row) for row in bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
    raise CheckpointError(
        f"{name}: NaN or Inf in row{'s' if len(bad) > 1 else ''} {shown} of {weight.shape[0] if of is None else of}; "
        f"the source checkpoint is damaged, or leave this layer out with ignore_layers"
    )
