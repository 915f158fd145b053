"""Linears with 16-bit weights whose layout is made once: y = x W^T for bf16 W, as for a language model's head.

`pack_bf16` lays a weight out as the kernels read it: int32 [ceil(N / 64), ceil(K / 2), 64], a word the bf16 numbers of
one output channel at two neighbouring k, the first in the lower half; channels and k beyond the last are zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import check_float, declare
from .wna16 import PANEL


def _pack_fake(weight: Tensor) -> Tensor:
    op = "pack_bf16"
    torch._check(
        weight.dim() == 2 and weight.dtype == torch.bfloat16,
        lambda: f"quantkit::{op}: weight must be 2-D torch.bfloat16, got {weight.dim()}-D {weight.dtype}",
    )
    rows, cols = weight.shape
    torch._check(cols > 0, lambda: f"quantkit::{op}: in_features must be positive, got {cols}")
    torch._check(
        cols == 1 or weight.stride(1) == 1,
        lambda: f"quantkit::{op}: weight must have its last dimension contiguous, got strides {list(weight.stride())}",
    )
    return weight.new_empty(((rows + PANEL - 1) // PANEL, (cols + 1) // 2, PANEL), dtype=torch.int32)


def _pack_reference(weight: Tensor) -> Tensor:
    out = _pack_fake(weight)
    panels, steps, _ = out.shape
    rows, cols = weight.shape
    padded = torch.nn.functional.pad(weight, (0, steps * 2 - cols, 0, panels * PANEL - rows))
    words = padded.flatten().view(torch.int32)
    return words.view(panels, PANEL, steps).transpose(1, 2).clone(memory_format=torch.contiguous_format)


def _gemm_fake(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    op = "bf16_gemm"
    torch._check(x.dim() == 2, lambda: f"quantkit::{op}: x must be 2-D [tokens, in_features], got {x.dim()}-D")
    check_float(op, "x", x)
    cols = x.shape[1]
    torch._check(
        cols <= 1 or x.stride(1) == 1,
        lambda: f"quantkit::{op}: x must have its last dimension contiguous, got strides {list(x.stride())}",
    )
    torch._check(cols > 0, lambda: f"quantkit::{op}: in_features must be positive, got {cols}")
    torch._check(out_features >= 0, lambda: f"quantkit::{op}: out_features must not be negative, got {out_features}")
    shape = [(out_features + PANEL - 1) // PANEL, (cols + 1) // 2, PANEL]
    torch._check(
        packed.dtype == torch.int32 and list(packed.shape) == shape and packed.is_contiguous(),
        lambda: (
            f"quantkit::{op}: packed must be what pack_bf16 makes of [{out_features}, {cols}]: "
            f"contiguous torch.int32 {shape}, got {packed.dtype} {list(packed.shape)}"
        ),
    )
    if bias is not None:
        torch._check(
            bias.dtype in (x.dtype, torch.float32) and list(bias.shape) == [out_features] and bias.is_contiguous(),
            lambda: (
                f"quantkit::{op}: bias must be contiguous {x.dtype} or torch.float32 [{out_features}], "
                f"got {bias.dtype} {list(bias.shape)}"
            ),
        )
    return x.new_empty((x.shape[0], out_features))


def _gemm_reference(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    out = _gemm_fake(x, packed, bias, out_features)
    if out.numel() == 0:
        return out
    # Flat, because a view as another dtype looks at the last stride even where there is one column.
    numbers = packed.transpose(1, 2).flatten().view(torch.bfloat16)
    weight = numbers.view(packed.shape[0] * PANEL, -1)[:out_features, : x.shape[1]]
    y = x.to(torch.float32) @ weight.to(torch.float32).T
    return (y if bias is None else y + bias.to(torch.float32)).to(x.dtype)


_pack = declare("pack_bf16(Tensor weight) -> Tensor", fake=_pack_fake, reference=_pack_reference)
_gemm = declare(
    "bf16_gemm(Tensor x, Tensor packed, Tensor? bias, int out_features) -> Tensor",
    fake=_gemm_fake,
    reference=_gemm_reference,
)


def pack_bf16(weight: Tensor) -> Tensor:
    """bf16 [N, K], any row stride -> the opaque tensor that `bf16_gemm` takes. Once per weight."""
    return _pack(weight)


def bf16_rows(packed: Tensor, rows: Tensor, in_features: int) -> Tensor:
    """Rows of the weight that `pack_bf16` was given, K = in_features: integers [...] -> bf16 [..., K]."""
    words = packed[rows // PANEL, :, rows % PANEL]
    return words.view(torch.bfloat16)[..., :in_features]


def bf16_gemm(x: Tensor, packed: Tensor, out_features: int, *, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias: F.linear with a bf16 weight in the kernels' own layout.

    x: fp32, fp16 or bf16 [M, K], any row stride; y: [M, N] of x's dtype. packed: of `pack_bf16`; out_features: N.
    bias: [N], of x's dtype or fp32. x is not rounded; sums are fp32: |y - exact| <= (K + 4) 2^-24 sum |x| |w|, plus the
    rounding to x's dtype. Subnormal bf16 numbers may count as zero.

    Errors: RuntimeError naming the argument, its value and what it must be.
    """
    return _gemm(x, packed, bias, out_features)
