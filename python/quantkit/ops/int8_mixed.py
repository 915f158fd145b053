"""LLM.int8(): columns of activations with outliers stay in 16 bit, everything else goes through int8.

Dettmers, Lewis, Belkada, Zettlemoyer: LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale, 2022.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import declare
from .quantize import _int8_per_token_reference
from .w8a8 import (
    check_bias,
    check_input,
    check_packed,
    check_weight_scale,
    multiply_exactly,
    scale_sums,
    unpack_codes,
)


def _check(
    x: Tensor, packed: Tensor, weight_scale: Tensor, out_features: int, threshold: float, bias: Tensor | None
) -> None:
    op = "int8_mixed_gemm"
    check_input(op, x)
    check_packed(op, packed, out_features, x.shape[1])
    check_weight_scale(op, weight_scale, out_features)
    check_bias(op, bias, x, out_features)
    torch._check(
        threshold > 0,
        lambda: f"quantkit::{op}: threshold must be positive (inf: no outliers), got {threshold}",
    )


def _fake(
    x: Tensor, packed: Tensor, weight_scale: Tensor, out_features: int, threshold: float, bias: Tensor | None
) -> Tensor:
    _check(x, packed, weight_scale, out_features, threshold, bias)
    return x.new_empty((x.shape[0], out_features))


def _reference(
    x: Tensor, packed: Tensor, weight_scale: Tensor, out_features: int, threshold: float, bias: Tensor | None
) -> Tensor:
    _check(x, packed, weight_scale, out_features, threshold, bias)
    if x.shape[0] == 0:
        return x.new_empty((0, out_features))
    weight = unpack_codes(packed, out_features, x.shape[1])
    outlier = (x.float().abs() >= threshold).any(0)
    codes, scale, _ = _int8_per_token_reference(x.masked_fill(outlier, 0.0), True)
    y = scale_sums(multiply_exactly(codes, weight), scale, weight_scale)
    if outlier.any():
        y = y + multiply_exactly(x[:, outlier], weight[:, outlier]).float() * weight_scale
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


_int8_mixed = declare(
    "int8_mixed_gemm(Tensor x, Tensor packed, Tensor weight_scale, int out_features, float threshold, Tensor? bias) "
    "-> Tensor",
    fake=_fake,
    reference=_reference,
)


def int8_mixed_gemm(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    out_features: int,
    *,
    threshold: float = 6.0,
    bias: Tensor | None = None,
) -> Tensor:
    """x [M, K] (fp32, fp16, bf16) times int8 weights, outliers of x in 16 bit -> [M, N] of x's dtype.

    Columns of x that hold a magnitude of at least `threshold` in any row keep x's dtype and meet the dequantized weight
    columns, their products summed in fp32 (the paper uses 6.0); the others are quantized per token as by `w8a8_gemm`,
    with scales that leave the outliers out. packed, weight_scale and bias as for `w8a8_gemm`. The result depends on
    which tokens share the call, since one outlier takes its column out for all of them.
    """
    return _int8_mixed(x, packed, weight_scale, out_features, threshold, bias)
