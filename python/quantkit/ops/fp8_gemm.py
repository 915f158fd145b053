"""FP8 Linears (e4m3fn weights; activations as they are, or FP8 too): exact codes, scaled in fp32 outside the sums.

The order of operations, which every kernel follows:

    codes, s_x = x quantized by tensor, token or group    the arithmetic of rtn_fp8, or of quantize_fp8 if static
    dot[s]     = sum over k of segment s of a[m, k] * w[n, k]     fp32; a: codes of x, or x itself
    y          = sum over s of dot[s] * (s_x[m, s] * s_w[n, s])   fp32
    result     = y + bias[n], rounded to x's dtype

Segments are runs of K that share their scales: the whole of it for scales by tensor, channel or token, 128 columns for
blocks and groups of 128. A scale thus never rounds a weight or an activation, as it does where blocks are dequantized
first. The order of the sum in a segment is the kernel's own.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ._library import check_float, declare, expand, grid
from .quantize import _quantize_fp8_reference
from .rtn import _rtn_fp8_reference

PANEL = 64  # columns of the result that are packed together


def panels(out_features: int) -> int:
    return -(-out_features // PANEL)


def panel_bytes(in_features: int) -> int:
    """4 codes of each of 64 columns at a time, then an fp32 number for each column."""
    return (-(-in_features // 4) + 1) * 4 * PANEL


def check_packed(op: str, packed: Tensor, out_features: int, in_features: int) -> None:
    torch._check(out_features >= 0, lambda: f"quantkit::{op}: out_features must not be negative, got {out_features}")
    shape = (panels(out_features), panel_bytes(in_features))
    torch._check(
        packed.dtype == torch.int8 and tuple(packed.shape) == shape and packed.is_contiguous(),
        lambda: (
            f"quantkit::{op}: packed must be what pack_fp8 makes of torch.float8_e4m3fn [{out_features}, {in_features}]"
            f": contiguous torch.int8 {list(shape)}, got {packed.dtype} {list(packed.shape)}"
        ),
    )


def check_weight(op: str, weight_scale: Tensor, weight_block: Sequence[int], out_features: int, cols: int) -> None:
    torch._check(
        len(weight_block) == 2 and all(b == -1 or b > 0 for b in weight_block),
        lambda: (
            f"quantkit::{op}: weight_block must be [rows, cols], positive or -1 for the whole extent, "
            f"got {list(weight_block)}"
        ),
    )
    shape = grid(out_features, cols, weight_block)
    torch._check(
        weight_scale.dtype == torch.float32 and tuple(weight_scale.shape) == shape and weight_scale.is_contiguous(),
        lambda: (
            f"quantkit::{op}: weight_scale must be contiguous torch.float32 {list(shape)} for the weight "
            f"[{out_features}, {cols}] and weight_block {list(weight_block)}, got {weight_scale.dtype} "
            f"{list(weight_scale.shape)}"
        ),
    )


def check_input(op: str, x: Tensor, input_scale: Tensor | None, input_block: Sequence[int] | None) -> None:
    torch._check(x.dim() == 2, lambda: f"quantkit::{op}: x must be 2-D [M, K], got {x.dim()}-D")
    check_float(op, "x", x)
    torch._check(
        x.shape[1] <= 1 or x.shape[0] == 0 or x.stride(1) == 1,
        lambda: f"quantkit::{op}: x must have its last dimension contiguous, got strides {list(x.stride())}",
    )
    if input_block is not None:
        torch._check(
            len(input_block) == 2
            and (
                list(input_block) == [-1, -1] or (input_block[0] == 1 and (input_block[1] == -1 or input_block[1] > 0))
            ),
            lambda: (
                f"quantkit::{op}: input_block must be [-1, -1] (tensor), [1, -1] (token) or [1, columns of a group], "
                f"got {list(input_block)}"
            ),
        )
    if input_scale is not None:
        torch._check(
            input_scale.dtype == torch.float32 and tuple(input_scale.shape) == (1,),
            lambda: (
                f"quantkit::{op}: input_scale must be torch.float32 [1], "
                f"got {input_scale.dtype} {list(input_scale.shape)}"
            ),
        )
        torch._check(
            input_block is None or list(input_block) == [-1, -1],
            lambda: (
                f"quantkit::{op}: input_scale is one for the tensor: input_block must be [-1, -1] or None, "
                f"got {input_block}"
            ),
        )


def check_bias(op: str, bias: Tensor | None, x: Tensor, shape: Sequence[int]) -> None:
    if bias is not None:
        torch._check(
            bias.dtype in (torch.float32, x.dtype) and list(bias.shape) == list(shape) and bias.is_contiguous(),
            lambda: (
                f"quantkit::{op}: bias must be contiguous torch.float32 or x's dtype {list(shape)}, "
                f"got {bias.dtype} {list(bias.shape)}"
            ),
        )


def quantized(
    x: Tensor, input_scale: Tensor | None, input_block: Sequence[int] | None
) -> tuple[Tensor, Tensor | None, int]:
    """What is multiplied, fp32 [M, K]; its scale fp32 [M, groups] or None; columns of a group."""
    rows, cols = x.shape
    if input_scale is not None:
        codes = _quantize_fp8_reference(x, input_scale.reshape(1, 1), [-1, -1], torch.float8_e4m3fn)
        return codes.float(), input_scale.expand(rows, 1), cols
    if input_block is None:
        return x.float(), None, cols
    codes, scale = _rtn_fp8_reference(x, list(input_block), torch.float8_e4m3fn)
    return codes.float(), scale.expand(rows, scale.shape[1]), cols if input_block[1] == -1 else input_block[1]


def pack_codes(codes: Tensor) -> Tensor:
    """[N, K] -> [N/64] panels of [K/4][64] words of four codes, the first k of them and the third, the second and the
    fourth. Then fp32 [64]: NaN for a column that holds a NaN, else zero.
    """
    rows, cols = codes.shape
    count, depth = panels(rows), -(-cols // 4)
    padded = torch.zeros((count * PANEL, depth * 4), dtype=torch.int8, device=codes.device)
    padded[:rows, :cols] = codes.view(torch.int8)
    words = padded.view(count, PANEL, depth, 2, 2).permute(0, 2, 1, 4, 3).reshape(count, depth * 4 * PANEL)
    nan = torch.zeros((count * PANEL,), dtype=torch.float32, device=codes.device)
    nan.masked_fill_((padded & 0x7F).eq(0x7F).any(1), float("nan"))
    return torch.cat([words, nan.view(count, PANEL).view(torch.int8)], 1)


def unpack_codes(packed: Tensor, out_features: int, in_features: int) -> Tensor:
    """The codes float8_e4m3fn [N, K] that `pack_codes` was given."""
    count, depth = panels(out_features), -(-in_features // 4)
    words = packed[:, : depth * 4 * PANEL].reshape(count, depth, PANEL, 2, 2)
    codes = words.permute(0, 2, 1, 4, 3).reshape(count * PANEL, depth * 4)
    return codes[:out_features, :in_features].view(torch.float8_e4m3fn)


def _pack_fake(codes: Tensor) -> Tensor:
    torch._check(
        codes.dim() == 2 and codes.dtype == torch.float8_e4m3fn,
        lambda: f"quantkit::pack_fp8: codes must be torch.float8_e4m3fn [N, K], got {codes.dtype} {list(codes.shape)}",
    )
    return codes.new_empty((panels(codes.shape[0]), panel_bytes(codes.shape[1])), dtype=torch.int8)


def _pack_reference(codes: Tensor) -> Tensor:
    _pack_fake(codes)
    return pack_codes(codes)


def _fp8_fake(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    weight_block: Sequence[int],
    out_features: int,
    input_scale: Tensor | None,
    input_block: Sequence[int] | None,
    bias: Tensor | None,
) -> Tensor:
    op = "fp8_gemm"
    check_input(op, x, input_scale, input_block)
    check_packed(op, packed, out_features, x.shape[1])
    check_weight(op, weight_scale, weight_block, out_features, x.shape[1])
    check_bias(op, bias, x, [out_features])
    return x.new_empty((x.shape[0], out_features))


def _fp8_reference(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    weight_block: Sequence[int],
    out_features: int,
    input_scale: Tensor | None,
    input_block: Sequence[int] | None,
    bias: Tensor | None,
) -> Tensor:
    out = _fp8_fake(x, packed, weight_scale, weight_block, out_features, input_scale, input_block, bias)
    if out.numel() == 0:
        return out
    cols = x.shape[1]
    y = torch.zeros_like(out, dtype=torch.float32)
    if cols:
        a, input_scales, group = quantized(x, input_scale, input_block)
        weight = unpack_codes(packed, out_features, cols).float()
        block = cols if weight_block[1] == -1 else weight_block[1]
        scale = expand(weight_scale, out_features, weight_scale.shape[1], [weight_block[0], 1])  # [N, blocks of K]
        edges = sorted({*range(0, cols, group), *range(0, cols, block), cols})
        for first, end in itertools.pairwise(edges):
            step = scale[:, first // block]
            if input_scales is not None:
                step = input_scales[:, first // group, None] * step
            y += (a[:, first:end] @ weight[:, first:end].T) * step
    if bias is not None:
        y += bias.float()
    return y.to(x.dtype)


_pack = declare("pack_fp8(Tensor codes) -> Tensor", fake=_pack_fake, reference=_pack_reference)
_gemm = declare(
    "fp8_gemm(Tensor x, Tensor packed, Tensor weight_scale, int[] weight_block, int out_features, Tensor? input_scale, "
    "int[]? input_block, Tensor? bias) -> Tensor",
    fake=_fp8_fake,
    reference=_fp8_reference,
)


def pack_fp8(codes: Tensor) -> Tensor:
    """FP8 weight codes float8_e4m3fn [N, K] as `fp8_gemm` reads them: opaque int8 [ceil(N / 64), bytes], the same on
    every device and instruction set. Made once, when a layer is loaded.
    """
    return _pack(codes)


def fp8_gemm(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    weight_block: Sequence[int],
    out_features: int,
    *,
    input_scale: Tensor | None = None,
    input_block: Sequence[int] | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """x W^T + bias with FP8 weights, W = code * scale: x [M, K] (fp32, fp16, bf16) -> [M, N] of x's dtype.

    packed: `pack_fp8` of codes [N, K]. weight_scale: fp32, a number for each block of `weight_block` [rows, cols], -1
    for the whole extent: [-1, -1] a tensor [1, 1], [1, -1] a channel [N, 1], [128, 128] as DeepSeek-V3, any other.
    bias: [N], fp32 or of x's dtype.

    x is multiplied as it is (W8A16) if neither `input_scale` nor `input_block` is given. With `input_scale` fp32 [1] it
    is quantized to e4m3 with that scale (`quantize_fp8`). With `input_block` it is quantized at run time as `rtn_fp8`
    does: [-1, -1] with a scale for all of x, [1, -1] one a token, [1, 128] one for each 128 columns of a token.

    Codes are multiplied exactly and summed in fp32; scales multiply sums (see the module). Per element,
    |y - exact| <= (K + S + 4) 2^-24 sum |a| |w| s_x s_w for S segments, plus the rounding to x's dtype; subnormal bf16
    numbers in x may count as zero. NaN in a row of x, or in a row of codes, is NaN in that row or column.

    CUDA from sm_89 on multiplies codes of a quantized x by FP8 tensor cores, unless scales change within 64 columns.
    These keep about 14 bits of a sum, which is added to others in fp32 after 128 columns: at worst another 4 * 33 *
    2^-13 sum |a| |w| s_x s_w is lost, on average far less. QUANTKIT_CUDA_GEMM=sm80 keeps fp32 throughout.
    """
    return _gemm(
        x,
        packed,
        weight_scale,
        list(weight_block),
        out_features,
        input_scale,
        None if input_block is None else list(input_block),
        bias,
    )
