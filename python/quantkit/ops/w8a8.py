"""int8 weights times int8 activations (W8A8): exact int32 sums, scaled once in fp32.

The order of operations, which every kernel follows bit for bit:

    codes, s_x, z = x quantized by row          the arithmetic of int8_quant_per_token, or quantize_int if static
    acc           = sum over k of (codes[m, k] - z[m]) * w[n, k]                exact, int32
    y             = fp32(acc) * (s_x[m] * s_w[n]) + bias[n]                     three roundings to fp32, nothing fused
    result        = y rounded to x's dtype

A NaN anywhere in a row of x makes the whole row of the result NaN, with static scales too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import check_float, declare
from .quantize import _int8_per_token_reference, _quantize_int_reference

PANEL = 64  # columns of the result that are packed together
# Longest row: sums of 128 * 128 stay within int32, and so do those of (code - zero point) * weight, up to 255 * 128.
MAX_DEPTH = (2**31 - 1) // (128 * 128)
MAX_ASYMMETRIC_DEPTH = (2**31 - 1) // (255 * 128)


def panels(out_features: int) -> int:
    return -(-out_features // PANEL)


def panel_bytes(in_features: int) -> int:
    """4 codes of each of 64 columns at a time, then the int32 sums of the columns."""
    return (-(-in_features // 4) + 1) * 4 * PANEL


def _check_codes(op: str, codes: Tensor) -> None:
    torch._check(
        codes.dim() == 2 and codes.dtype == torch.int8,
        lambda: f"quantkit::{op}: codes must be torch.int8 [N, K], got {codes.dtype} {list(codes.shape)}",
    )
    torch._check(
        codes.shape[1] <= MAX_DEPTH,
        lambda: (
            f"quantkit::{op}: K must be at most {MAX_DEPTH}, or the int32 sums could overflow, got {codes.shape[1]}"
        ),
    )


def check_packed(op: str, packed: Tensor, out_features: int, in_features: int) -> None:
    torch._check(out_features >= 0, lambda: f"quantkit::{op}: out_features must not be negative, got {out_features}")
    shape = (panels(out_features), panel_bytes(in_features))
    torch._check(
        packed.dtype == torch.int8 and tuple(packed.shape) == shape,
        lambda: (
            f"quantkit::{op}: packed must be what pack_w8a8 makes of int8 [{out_features}, {in_features}], torch.int8 "
            f"{list(shape)}, got {packed.dtype} {list(packed.shape)}"
        ),
    )
    torch._check(
        packed.is_contiguous(),
        lambda: f"quantkit::{op}: packed must be contiguous, got strides {list(packed.stride())}",
    )


def check_input(op: str, x: Tensor) -> None:
    torch._check(x.dim() == 2, lambda: f"quantkit::{op}: x must be 2-D [M, K], got {x.dim()}-D")
    check_float(op, "x", x)


def check_weight_scale(op: str, weight_scale: Tensor, out_features: int) -> None:
    torch._check(
        weight_scale.dtype == torch.float32 and tuple(weight_scale.shape) in ((out_features,), (1,)),
        lambda: (
            f"quantkit::{op}: weight_scale must be torch.float32 [{out_features}] or [1], "
            f"got {weight_scale.dtype} {list(weight_scale.shape)}"
        ),
    )
    torch._check(
        weight_scale.is_contiguous(),
        lambda: f"quantkit::{op}: weight_scale must be contiguous, got strides {list(weight_scale.stride())}",
    )


def check_bias(op: str, bias: Tensor | None, x: Tensor, out_features: int) -> None:
    if bias is None:
        return
    torch._check(
        bias.dtype in (torch.float32, x.dtype) and tuple(bias.shape) == (out_features,),
        lambda: (
            f"quantkit::{op}: bias must be torch.float32 or x's dtype [{out_features}], "
            f"got {bias.dtype} {list(bias.shape)}"
        ),
    )
    torch._check(
        bias.is_contiguous(), lambda: f"quantkit::{op}: bias must be contiguous, got strides {list(bias.stride())}"
    )


def pack_codes(codes: Tensor) -> Tensor:
    """[N, K] -> [N/64] panels of [K/4][64][4] codes and 64 int32 sums, zero where there is no row or column."""
    rows, cols = codes.shape
    count, depth = panels(rows), -(-cols // 4)
    padded = codes.new_zeros((count * PANEL, depth * 4))
    padded[:rows, :cols] = codes
    words = padded.view(count, PANEL, depth, 4).transpose(1, 2).reshape(count, depth * 4 * PANEL)
    sums = padded.view(count, PANEL, depth * 4).sum(-1, dtype=torch.int32)
    return torch.cat([words, sums.view(torch.int8)], 1)


def unpack_codes(packed: Tensor, out_features: int, in_features: int) -> Tensor:
    """The int8 codes [N, K] that `pack_codes` was given."""
    count, depth = panels(out_features), -(-in_features // 4)
    words = packed[:, : depth * 4 * PANEL].reshape(count, depth, PANEL, 4).transpose(1, 2)
    return words.reshape(count * PANEL, depth * 4)[:out_features, :in_features]


def multiply_exactly(a: Tensor, weight: Tensor) -> Tensor:
    """a weight^T in fp64, where sums of products of int8 are exact."""
    return a.double() @ weight.double().T


def scale_sums(acc: Tensor, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """fp32(acc) * (s_x * s_w); input_scale [M, 1]."""
    return acc.float() * (input_scale * weight_scale)


def _pack_fake(codes: Tensor) -> Tensor:
    _check_codes("pack_w8a8", codes)
    return codes.new_empty((panels(codes.shape[0]), panel_bytes(codes.shape[1])))


def _pack_reference(codes: Tensor) -> Tensor:
    _check_codes("pack_w8a8", codes)
    return pack_codes(codes)


def _check_int8_gemm(a: Tensor, packed: Tensor, out_features: int) -> None:
    torch._check(
        a.dim() == 2 and a.dtype == torch.int8,
        lambda: f"quantkit::int8_gemm: a must be torch.int8 [M, K], got {a.dtype} {list(a.shape)}",
    )
    check_packed("int8_gemm", packed, out_features, a.shape[1])


def _int8_gemm_fake(a: Tensor, packed: Tensor, out_features: int) -> Tensor:
    _check_int8_gemm(a, packed, out_features)
    return a.new_empty((a.shape[0], out_features), dtype=torch.int32)


def _int8_gemm_reference(a: Tensor, packed: Tensor, out_features: int) -> Tensor:
    _check_int8_gemm(a, packed, out_features)
    return multiply_exactly(a, unpack_codes(packed, out_features, a.shape[1])).to(torch.int32)


def _check_w8a8(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    out_features: int,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    symmetric: bool,
    bias: Tensor | None,
) -> None:
    op = "w8a8_gemm"
    check_input(op, x)
    check_packed(op, packed, out_features, x.shape[1])
    check_weight_scale(op, weight_scale, out_features)
    check_bias(op, bias, x, out_features)
    if input_scale is not None:
        torch._check(
            input_scale.dtype == torch.float32 and tuple(input_scale.shape) == (1,),
            lambda: (
                f"quantkit::{op}: input_scale must be torch.float32 [1], "
                f"got {input_scale.dtype} {list(input_scale.shape)}"
            ),
        )
    if input_zero_point is not None:
        torch._check(
            input_zero_point.dtype == torch.int8 and tuple(input_zero_point.shape) == (1,),
            lambda: (
                f"quantkit::{op}: input_zero_point must be torch.int8 [1], "
                f"got {input_zero_point.dtype} {list(input_zero_point.shape)}"
            ),
        )
    torch._check(
        input_scale is not None or input_zero_point is None,
        lambda: f"quantkit::{op}: input_zero_point needs input_scale; without one, x is quantized per token",
    )
    torch._check(
        symmetric or input_scale is None or input_zero_point is not None,
        lambda: f"quantkit::{op}: symmetric=False with input_scale needs input_zero_point",
    )
    asymmetric = input_zero_point is not None or not symmetric
    torch._check(
        not asymmetric or x.shape[1] <= MAX_ASYMMETRIC_DEPTH,
        lambda: (
            f"quantkit::{op}: K must be at most {MAX_ASYMMETRIC_DEPTH} with asymmetric codes, or the int32 sums could "
            f"overflow, got {x.shape[1]}"
        ),
    )


def _quantized(
    x: Tensor, input_scale: Tensor | None, input_zero_point: Tensor | None, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes int8 [M, K], scale fp32 [M, 1] and zero point int8 [M, 1] or None."""
    if input_scale is None or x.shape[1] == 0:
        codes, scale, offset = _int8_per_token_reference(x, symmetric)
        return codes, scale, None if symmetric else offset
    rows = x.shape[0]
    scale = input_scale.expand(rows, 1)
    zero_point = None if input_zero_point is None else input_zero_point.expand(rows, 1)
    codes = _quantize_int_reference(x, scale, zero_point, [1, -1], -127 if zero_point is None else -128, 127)
    return codes, scale.masked_fill(x.isnan().any(1, keepdim=True), float("nan")), zero_point


def _w8a8_fake(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    out_features: int,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    symmetric: bool,
    bias: Tensor | None,
) -> Tensor:
    _check_w8a8(x, packed, weight_scale, out_features, input_scale, input_zero_point, symmetric, bias)
    return x.new_empty((x.shape[0], out_features))


def _w8a8_reference(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    out_features: int,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    symmetric: bool,
    bias: Tensor | None,
) -> Tensor:
    _check_w8a8(x, packed, weight_scale, out_features, input_scale, input_zero_point, symmetric, bias)
    if x.shape[0] == 0:
        return x.new_empty((0, out_features))
    codes, scale, zero_point = _quantized(x, input_scale, input_zero_point, symmetric)
    weight = unpack_codes(packed, out_features, x.shape[1])
    acc = multiply_exactly(codes, weight)
    if zero_point is not None:
        acc -= zero_point.double() * weight.double().sum(1)
    y = scale_sums(acc, scale, weight_scale)
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


_pack = declare("pack_w8a8(Tensor codes) -> Tensor", fake=_pack_fake, reference=_pack_reference)
_int8_gemm = declare(
    "int8_gemm(Tensor a, Tensor packed, int out_features) -> Tensor",
    fake=_int8_gemm_fake,
    reference=_int8_gemm_reference,
)
_w8a8_gemm = declare(
    "w8a8_gemm(Tensor x, Tensor packed, Tensor weight_scale, int out_features, Tensor? input_scale, "
    "Tensor? input_zero_point, bool symmetric, Tensor? bias) -> Tensor",
    fake=_w8a8_fake,
    reference=_w8a8_reference,
)


def pack_w8a8(codes: Tensor) -> Tensor:
    """int8 weight codes [N, K] (-128 too) as the W8A8 kernels read them: int8 [ceil(N / 64), bytes], the same on every
    device and instruction set. K is at most 131071. Made once, when a layer is loaded.
    """
    return _pack(codes)


def int8_gemm(a: Tensor, packed: Tensor, out_features: int) -> Tensor:
    """a w^T, exactly: int8 [M, K] times `pack_w8a8` of int8 [N, K] -> int32 [M, N]. -128 is a code like any other."""
    return _int8_gemm(a, packed, out_features)


def w8a8_gemm(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    out_features: int,
    *,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
    symmetric: bool = True,
    bias: Tensor | None = None,
) -> Tensor:
    """x [M, K] (fp32, fp16, bf16) quantized to int8 and multiplied by int8 weights -> [M, N] of x's dtype.

    packed: `pack_w8a8` of codes [N, K]; weight = code * weight_scale, fp32 [N] or [1]; bias [N], fp32 or of x's dtype.
    Without `input_scale`, x is quantized per token: symmetric codes in [-127, 127], or with `symmetric=False` codes in
    [-128, 127] and a zero point for each token. With `input_scale` fp32 [1] (and `input_zero_point` int8 [1], x =
    (code - zero point) * scale), as static W8A8 in compressed-tensors, codes are those of `quantize_int`.

    The int32 sums are exact; the scaling is fp32, bit for bit the same on every instruction set (see the module). NaN
    in a row of x gives NaN in that row. Asymmetric codes need K <= 65793, symmetric ones K <= 131071.
    """
    return _w8a8_gemm(x, packed, weight_scale, out_features, input_scale, input_zero_point, symmetric, bias)
