"""Weight-only int4 and int8 Linears (W4A16, W8A16): y = x W^T with W = (code - zero point) * scale.

`pack_wna16` lays a weight out once as the kernels read it; the layout is private, the same on every instruction set:

    int32 [ceil(N / 64), ceil(K / per word), 64]      per word = 32 / num_bits

Panel p holds the output channels 64 p ... 64 p + 63, side by side; a word holds consecutive k of one channel as
unsigned codes (code + 2^(bits - 1)): the even ones, from its lowest bits up, in its lower 16 bits, the odd ones in its
upper 16, so that a shift and a table look-up give pairs of bf16. Channels and k beyond the last are zero bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import check_float, declare

PANEL = 64


def _shifts(num_bits: int, device: torch.device) -> Tensor:
    """Where the k-th code of a word is."""
    k = torch.arange(32 // num_bits, device=device)
    return k % 2 * 16 + k // 2 * num_bits


def _check_bits(op: str, num_bits: int) -> None:
    torch._check(num_bits in (4, 8), lambda: f"quantkit::{op}: num_bits must be 4 or 8, got {num_bits}")


def _check_perm(op: str, perm: Tensor | None, cols: int) -> None:
    if perm is not None:
        torch._check(
            perm.dtype == torch.int32 and tuple(perm.shape) == (cols,),
            lambda: f"quantkit::{op}: perm must be torch.int32 [{cols}], got {perm.dtype} {list(perm.shape)}",
        )
        torch._check(
            perm.is_contiguous(),
            lambda: f"quantkit::{op}: perm must be contiguous, got strides {list(perm.stride())}",
        )


def _check_perm_values(op: str, perm: Tensor | None, cols: int) -> None:
    if perm is not None:
        wrong = perm[(perm < 0) | (perm >= cols)]
        torch._check(
            len(wrong) == 0,
            lambda: f"quantkit::{op}: perm must hold columns 0 to {cols - 1}, got {int(wrong[0])}",
        )


def _pack_fake(words: Tensor, num_bits: int, in_features: int, perm: Tensor | None) -> Tensor:
    op = "pack_wna16"
    _check_bits(op, num_bits)
    torch._check(in_features > 0, lambda: f"quantkit::{op}: in_features must be positive, got {in_features}")
    stored = (in_features * num_bits + 31) // 32
    torch._check(
        words.dim() == 2 and words.dtype == torch.int32 and words.shape[1] == stored,
        lambda: (
            f"quantkit::{op}: words must be torch.int32 [N, {stored}] for {in_features} codes of {num_bits} bits, "
            f"got {words.dtype} {list(words.shape)}"
        ),
    )
    _check_perm(op, perm, in_features)
    per_word = 32 // num_bits
    shape = ((words.shape[0] + PANEL - 1) // PANEL, (in_features + per_word - 1) // per_word, PANEL)
    return words.new_empty(shape)


def _codes_of_words(words: Tensor, shifts: Tensor, num_bits: int) -> Tensor:
    """Unsigned codes, int64 [..., per word]."""
    return (words.to(torch.int64).unsqueeze(-1) >> shifts) & ((1 << num_bits) - 1)


def _pack_reference(words: Tensor, num_bits: int, in_features: int, perm: Tensor | None) -> Tensor:
    out = _pack_fake(words, num_bits, in_features, perm)
    _check_perm_values("pack_wna16", perm, in_features)
    per_word = 32 // num_bits
    stored = torch.arange(per_word, device=words.device) * num_bits
    codes = _codes_of_words(words, stored, num_bits).flatten(1)[:, :in_features]
    if perm is not None:
        codes = codes[:, perm.long()]
    panels, steps, _ = out.shape
    codes = torch.nn.functional.pad(codes, (0, steps * per_word - in_features, 0, panels * PANEL - codes.shape[0]))
    packed = (codes.reshape(panels, PANEL, steps, per_word) << _shifts(num_bits, words.device)).sum(-1)
    packed = torch.where(packed >= 1 << 31, packed - (1 << 32), packed)
    return packed.to(torch.int32).transpose(1, 2).clone(memory_format=torch.contiguous_format)


def _gemm_fake(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    perm: Tensor | None,
    bias: Tensor | None,
    num_bits: int,
    out_features: int,
    group_size: int,
) -> Tensor:
    op = "wna16_gemm"
    torch._check(x.dim() == 2, lambda: f"quantkit::{op}: x must be 2-D [tokens, in_features], got {x.dim()}-D")
    check_float(op, "x", x)
    torch._check(
        x.shape[1] <= 1 or x.stride(1) == 1,
        lambda: f"quantkit::{op}: x must have its last dimension contiguous, got strides {list(x.stride())}",
    )
    _check_bits(op, num_bits)
    cols, per_word = x.shape[1], 32 // num_bits
    torch._check(cols > 0, lambda: f"quantkit::{op}: in_features must be positive, got {cols}")
    torch._check(out_features >= 0, lambda: f"quantkit::{op}: out_features must not be negative, got {out_features}")
    shape = [(out_features + PANEL - 1) // PANEL, (cols + per_word - 1) // per_word, PANEL]
    torch._check(
        packed.dtype == torch.int32 and list(packed.shape) == shape and packed.is_contiguous(),
        lambda: (
            f"quantkit::{op}: packed must be what pack_wna16 makes of {num_bits} bits [{out_features}, {cols}]: "
            f"contiguous torch.int32 {shape}, got {packed.dtype} {list(packed.shape)}"
        ),
    )
    torch._check(
        group_size == -1 or (group_size > 0 and cols % group_size == 0),
        lambda: f"quantkit::{op}: group_size must be -1 or divide in_features {cols}, got {group_size}",
    )
    groups = 1 if group_size == -1 else cols // group_size
    check_float(op, "weight_scale", weight_scale)
    panels = [shape[0], groups, PANEL]
    torch._check(
        list(weight_scale.shape) in ([out_features, groups], panels) and weight_scale.is_contiguous(),
        lambda: (
            f"quantkit::{op}: weight_scale must be contiguous [{out_features}, {groups}] for group_size {group_size}, "
            f"or pack_wna16_scales of it, {panels}, got {list(weight_scale.shape)}"
        ),
    )
    if weight_zero_point is not None:
        torch._check(
            weight_zero_point.dtype == torch.int8
            and weight_zero_point.shape == weight_scale.shape
            and weight_zero_point.is_contiguous(),
            lambda: (
                f"quantkit::{op}: weight_zero_point must be contiguous torch.int8 {list(weight_scale.shape)}, "
                f"got {weight_zero_point.dtype} {list(weight_zero_point.shape)}"
            ),
        )
    _check_perm(op, perm, cols)
    if bias is not None:
        torch._check(
            bias.dtype in (x.dtype, torch.float32) and list(bias.shape) == [out_features] and bias.is_contiguous(),
            lambda: (
                f"quantkit::{op}: bias must be contiguous {x.dtype} or torch.float32 [{out_features}], "
                f"got {bias.dtype} {list(bias.shape)}"
            ),
        )
    return x.new_empty((x.shape[0], out_features))


def _gemm_reference(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    perm: Tensor | None,
    bias: Tensor | None,
    num_bits: int,
    out_features: int,
    group_size: int,
) -> Tensor:
    out = _gemm_fake(x, packed, weight_scale, weight_zero_point, perm, bias, num_bits, out_features, group_size)
    cols = x.shape[1]
    _check_perm_values("wna16_gemm", perm, cols)
    if out.numel() == 0:
        return out
    codes = _codes_of_words(packed.transpose(1, 2), _shifts(num_bits, packed.device), num_bits)
    weight = codes.reshape(packed.shape[0] * PANEL, -1)[:out_features, :cols].to(torch.float32)
    scale = rows_of_panels(weight_scale, out_features)
    weight = weight.reshape(out_features, scale.shape[1], -1) - (1 << (num_bits - 1))
    if weight_zero_point is not None:
        weight = weight - rows_of_panels(weight_zero_point, out_features).to(torch.float32).unsqueeze(-1)
    weight = (weight * scale.to(torch.float32).unsqueeze(-1)).reshape(out_features, cols)
    y = (x if perm is None else x[:, perm.long()]).to(torch.float32) @ weight.T
    return (y if bias is None else y + bias.to(torch.float32)).to(x.dtype)


_pack = declare(
    "pack_wna16(Tensor words, int num_bits, int in_features, Tensor? perm) -> Tensor",
    fake=_pack_fake,
    reference=_pack_reference,
)
_gemm = declare(
    "wna16_gemm(Tensor x, Tensor packed, Tensor weight_scale, Tensor? weight_zero_point, Tensor? perm, Tensor? bias, "
    "int num_bits, int out_features, int group_size) -> Tensor",
    fake=_gemm_fake,
    reference=_gemm_reference,
)


def pack_wna16(words: Tensor, num_bits: int, in_features: int, perm: Tensor | None = None) -> Tensor:
    """A weight as compressed-tensors stores it -> the opaque tensor that `wna16_gemm` takes. Once per weight.

    words: int32 [N, ceil(K * num_bits / 32)], `weight_packed` of the format `pack-quantized` (see `pack_int32`);
    num_bits: 4 or 8; in_features: K.
    perm: int32 [K], for act order: column k of the result is column perm[k] of the weight, so that a group's columns
    are neighbours (a stable argsort of `weight_g_idx`). Give the same one to `wna16_gemm`. (On CUDA its numbers are not
    checked; a column that the weight does not have reads as the lowest code.)

    Errors: RuntimeError naming the argument.
    """
    return _pack(words, num_bits, in_features, perm)


def scales_by_panels(op: str, values: Tensor) -> Tensor:
    """[N, G] -> [ceil(N / 64), G, 64], zero beyond row N."""
    torch._check(values.dim() == 2, lambda: f"quantkit::{op}: values must be 2-D [N, G], got {values.dim()}-D")
    rows, groups = values.shape
    panels = (rows + PANEL - 1) // PANEL
    padded = values.new_zeros((panels * PANEL, groups))
    padded[:rows] = values
    return padded.view(panels, PANEL, groups).transpose(1, 2).clone(memory_format=torch.contiguous_format)


def rows_of_panels(values: Tensor, out_features: int) -> Tensor:
    """Scales or zero points [N, G], from that or from what `scales_by_panels` makes of it."""
    return values if values.dim() == 2 else values.transpose(1, 2).flatten(0, 1)[:out_features]


def pack_wna16_scales(values: Tensor) -> Tensor:
    """Scales or zero points [N, G] in the order in which `wna16_gemm` reads them: [ceil(N / 64), G, 64], zero beyond
    row N. The gemm takes both forms; with [N, G] it has to turn them at each call, which one token feels.
    """
    return scales_by_panels("pack_wna16_scales", values)


def wna16_gemm(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    num_bits: int,
    out_features: int,
    group_size: int,
    *,
    weight_zero_point: Tensor | None = None,
    perm: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """y = x W^T + bias, W = (code - zero point) * scale: a Linear with int4 or int8 weights (W4A16, W8A16).

    x: fp32, fp16 or bf16 [M, K], any row stride; y: [M, N] of x's dtype.
    packed: of `pack_wna16`; num_bits: 4 or 8; out_features: N.
    weight_scale: fp32, bf16 or fp16 [N, G], weight_zero_point: int8 [N, G] in the range of signed codes, with
    G = K / group_size groups of neighbouring columns, or 1 for group_size -1: a scale per channel; or both as
    `pack_wna16_scales` lays them out, [ceil(N / 64), G, 64].
    perm: what `pack_wna16` got: x's columns are taken in this order. (On CUDA its numbers are not checked; a column
    that x does not have reads as NaN.)
    bias: [N], of x's dtype or fp32.

    Accuracy: codes are exact, sums fp32; a group's scale multiplies its sum. fp32 and fp16 x are not rounded to bf16.
    Per element, |y - exact| <= (K + G + 4) 2^-24 sum |x| (|code| + |zero point|) scale, plus the rounding to x's dtype.
    Subnormal bf16 x may count as zero.

    Errors: RuntimeError naming the argument, its value and what it must be.
    """
    return _gemm(x, packed, weight_scale, weight_zero_point, perm, bias, num_bits, out_features, group_size)
