"""int4 weights with group scales times int8 activations (W4A8): exact int32 sums of groups, scaled in fp32.

The order of operations, which every kernel follows bit for bit:

    a, s_x  = x quantized by row                      the arithmetic of int8_quant_per_token, symmetric
    p[g]    = sum over k of group g of (code[n, k] - zero point[n, g]) * a[m, k]        exact, int32
    y       = 0, then for each group in turn: y + fp32(p[g]) * s_w[n, g]                nothing fused
    y       = y * s_x[m] + bias[n]                                                      nothing fused
    result  = y rounded to x's dtype

A NaN or infinity anywhere in a row of x makes the whole row of the result NaN.

The split of the work is QQQ's (Zhang et al.: QQQ: Quality Quattuor-Bit Quantization for Large Language Models, 2024),
with scales of groups in fp32 instead of weights rounded once more to int8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import check_float, declare
from .quantize import _int8_per_token_reference
from .w8a8 import check_bias, check_input
from .wna16 import rows_of_panels, scales_by_panels

PANEL = 64  # columns of the result that are packed together
# Longest group: sums of (code - zero point) * a stay within int32, for any int8 zero point.
MAX_GROUP = (2**31 - 1) // ((7 + 128) * 127)


def _panels(out_features: int) -> int:
    return -(-out_features // PANEL)


def _check_pack(words: Tensor, in_features: int) -> None:
    op = "pack_w4a8"
    torch._check(
        words.dim() == 2 and words.dtype == torch.int32,
        lambda: f"quantkit::{op}: words must be torch.int32 [N, ceil(K / 8)], got {words.dtype} {list(words.shape)}",
    )
    torch._check(
        words.shape[1] == (in_features + 7) // 8,
        lambda: (
            f"quantkit::{op}: in_features {in_features} takes {(in_features + 7) // 8} words a row, words has "
            f"{words.shape[1]}"
        ),
    )


def _pack_fake(words: Tensor, in_features: int) -> Tensor:
    _check_pack(words, in_features)
    return words.new_empty((_panels(words.shape[0]), words.shape[1], PANEL))


def _pack_reference(words: Tensor, in_features: int) -> Tensor:
    """[N, K/8] -> [N/64][K/8][64] words: byte j has element j in its low half, element 4 + j in its high half."""
    _check_pack(words, in_features)
    rows, depth = words.shape
    low, high = words & 0xFFFF, (words >> 16) & 0xFFFF
    apart = [(half & 0xF) | (half & 0xF0) << 4 | (half & 0xF00) << 8 | (half & 0xF000) << 12 for half in (low, high)]
    padded = words.new_zeros((_panels(rows) * PANEL, depth))
    padded[:rows] = apart[0] | apart[1] << 4
    return padded.view(_panels(rows), PANEL, depth).transpose(1, 2).clone(memory_format=torch.contiguous_format)


def _unpack(packed: Tensor, out_features: int, in_features: int) -> Tensor:
    """The unsigned codes [N, K], 0 to 15, as int32."""
    panels, depth, _ = packed.shape
    shifts = torch.tensor([0, 8, 16, 24, 4, 12, 20, 28], dtype=torch.int32, device=packed.device)
    codes = packed.transpose(1, 2).reshape(panels * PANEL, depth, 1) >> shifts & 15
    return codes.reshape(panels * PANEL, depth * 8)[:out_features, :in_features]


def _groups(group_size: int, in_features: int) -> int:
    return (1 if group_size == -1 else in_features // group_size) if in_features else 0


def _check(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    out_features: int,
    group_size: int,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
) -> None:
    op = "w4a8_gemm"
    check_input(op, x)
    cols = x.shape[1]
    torch._check(out_features >= 0, lambda: f"quantkit::{op}: out_features must not be negative, got {out_features}")
    shape = (_panels(out_features), (cols + 7) // 8, PANEL)
    torch._check(
        packed.dtype == torch.int32 and tuple(packed.shape) == shape,
        lambda: (
            f"quantkit::{op}: packed must be what pack_w4a8 makes of {out_features} rows of {cols} codes, torch.int32 "
            f"{list(shape)}, got {packed.dtype} {list(packed.shape)}"
        ),
    )
    torch._check(
        packed.is_contiguous(),
        lambda: f"quantkit::{op}: packed must be contiguous, got strides {list(packed.stride())}",
    )
    torch._check(
        group_size == -1 or (group_size > 0 and cols % group_size == 0 and group_size % 4 == 0),
        lambda: (
            f"quantkit::{op}: group_size must be -1 (the whole row) or a multiple of 4 that divides K = {cols}, "
            f"got {group_size}"
        ),
    )
    longest = cols if group_size == -1 else group_size
    torch._check(
        longest <= MAX_GROUP,
        lambda: (
            f"quantkit::{op}: a group must be at most {MAX_GROUP} columns, or the int32 sums could overflow, got "
            f"{longest}"
        ),
    )
    groups = _groups(group_size, cols)
    shapes = ((out_features, groups), (_panels(out_features), groups, PANEL))
    check_float(op, "weight_scale", weight_scale)
    torch._check(
        tuple(weight_scale.shape) in shapes,
        lambda: (
            f"quantkit::{op}: weight_scale must be [N, G] = {list(shapes[0])} or pack_w4a8_scales of it, "
            f"{list(shapes[1])}, got {list(weight_scale.shape)}"
        ),
    )
    torch._check(
        weight_scale.is_contiguous(),
        lambda: f"quantkit::{op}: weight_scale must be contiguous, got strides {list(weight_scale.stride())}",
    )
    if weight_zero_point is not None:
        torch._check(
            weight_zero_point.dtype == torch.int8 and weight_zero_point.shape == weight_scale.shape,
            lambda: (
                f"quantkit::{op}: weight_zero_point must be torch.int8 of weight_scale's shape "
                f"{list(weight_scale.shape)}, got {weight_zero_point.dtype} {list(weight_zero_point.shape)}"
            ),
        )
        torch._check(
            weight_zero_point.is_contiguous(),
            lambda: (
                f"quantkit::{op}: weight_zero_point must be contiguous, got strides {list(weight_zero_point.stride())}"
            ),
        )
    check_bias(op, bias, x, out_features)


def _fake(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    out_features: int,
    group_size: int,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    _check(x, packed, weight_scale, out_features, group_size, weight_zero_point, bias)
    return x.new_empty((x.shape[0], out_features))


def _reference(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    out_features: int,
    group_size: int,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    _check(x, packed, weight_scale, out_features, group_size, weight_zero_point, bias)
    rows, cols = x.shape
    y = x.new_zeros((rows, out_features), dtype=torch.float32)
    if rows and cols:
        codes, input_scale, _ = _int8_per_token_reference(x, True)
        # Sums of products of such integers are exact in fp64.
        a, weight = codes.double(), _unpack(packed, out_features, cols).double() - 8.0
        scale = rows_of_panels(weight_scale, out_features).float()
        size = cols if group_size == -1 else group_size
        for g in range(_groups(group_size, cols)):
            columns = weight[:, g * size : (g + 1) * size]
            if weight_zero_point is not None:
                columns = columns - rows_of_panels(weight_zero_point, out_features)[:, g : g + 1].double()
            y = y + (a[:, g * size : (g + 1) * size] @ columns.T).float() * scale[:, g]
        y = y * input_scale
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


_pack = declare("pack_w4a8(Tensor words, int in_features) -> Tensor", fake=_pack_fake, reference=_pack_reference)
_w4a8_gemm = declare(
    "w4a8_gemm(Tensor x, Tensor packed, Tensor weight_scale, int out_features, int group_size, "
    "Tensor? weight_zero_point, Tensor? bias) -> Tensor",
    fake=_fake,
    reference=_reference,
)


def pack_w4a8(words: Tensor, in_features: int) -> Tensor:
    """int4 weight codes as the W4A8 kernels read them: int32 [ceil(N / 64), ceil(K / 8), 64], the same on every device
    and instruction set. Made once, when a layer is loaded.

    words: int32 [N, ceil(K / 8)] as `pack_int32` and compressed-tensors' `weight_packed` hold them; K = in_features.
    """
    return _pack(words, in_features)


def pack_w4a8_scales(values: Tensor) -> Tensor:
    """Scales or zero points [N, G] in the order in which `w4a8_gemm` reads them: [ceil(N / 64), G, 64], zero beyond row
    N. The gemm takes both forms; with [N, G] it has to make this one at each call.
    """
    return scales_by_panels("pack_w4a8_scales", values)


def w4a8_gemm(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    out_features: int,
    group_size: int,
    *,
    weight_zero_point: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """x [M, K] (fp32, fp16, bf16) quantized to int8 per token and multiplied by int4 weights -> [M, N] of x's dtype.

    packed: `pack_w4a8` of the codes [N, K]; weight = (code - zero point) * scale, code in [-8, 7]. `weight_scale` fp32,
    fp16 or bf16 and `weight_zero_point` int8 (None: 0) are both [N, G], or both what `pack_w4a8_scales` makes of that,
    which is faster. G = K / group_size; group_size is a multiple of 4 that divides K, or -1 for the whole row, G = 1.
    bias [N], fp32 or of x's dtype. A group is at most 125254 columns.

    Each token gets the symmetric scale and codes of `int8_quant_per_token`. The int32 sums of groups are exact; the
    scaling is fp32, bit for bit the same on every instruction set (see the module). NaN or infinity in a row of x gives
    NaN in that row.

    On CUDA tensor cores take groups that are multiples of 32 and whole rows; other groups are multiplied by a plain
    kernel, many times slower. Those of sm_90a's own instructions take multiples of 128.
    """
    return _w4a8_gemm(x, packed, weight_scale, out_features, group_size, weight_zero_point, bias)
