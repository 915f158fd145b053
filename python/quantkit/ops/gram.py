"""The Gram matrix of a Linear's input, x^T x: what GPTQ and the scale searches know about the activations."""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import check_float, declare


def _check(x: Tensor, g: Tensor) -> None:
    op = "gram_accumulate"
    torch._check(x.dim() == 2, lambda: f"quantkit::{op}: x must be 2-D [tokens, columns], got {x.dim()}-D")
    check_float(op, "x", x)
    torch._check(
        g.dtype == torch.float32 and tuple(g.shape) == (x.shape[1], x.shape[1]),
        lambda: (
            f"quantkit::{op}: g must be torch.float32 [{x.shape[1]}, {x.shape[1]}], x's columns squared, "
            f"got {g.dtype} {list(g.shape)}"
        ),
    )
    torch._check(g.is_contiguous(), lambda: f"quantkit::{op}: g must be contiguous, got strides {list(g.stride())}")


def _fake(x: Tensor, g: Tensor) -> None:
    _check(x, g)


def _reference(x: Tensor, g: Tensor) -> None:
    _check(x, g)
    wide = x.float()
    g.addmm_(wide.T, wide)


_accumulate = declare(
    "gram_accumulate(Tensor x, Tensor(a!) g) -> ()", fake=_fake, reference=_reference, kernels=("CPU",)
)


def gram_accumulate(x: Tensor, g: Tensor) -> None:
    """g += x^T x, in place. x [tokens, K] fp32, fp16 or bf16; g fp32 [K, K], symmetric.

    Products and sums are fp32. Only the upper half is computed and then mirrored: all of g is valid on return, and
    exactly symmetric. NaN and infinities in column k of x make g[k, k] NaN or infinite. bf16 numbers below 2^-126
    may count as zero.
    """
    _accumulate(x, g)
