"""The Gram matrix of a Linear's input, x^T x: what GPTQ and the scale searches know about the activations."""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import check_float, declare


def _check(x: Tensor, mask: Tensor | None, g: Tensor, channels: Tensor | None, op: str = "gram_accumulate") -> None:
    torch._check(x.dim() == 2, lambda: f"quantkit::{op}: x must be 2-D [tokens, columns], got {x.dim()}-D")
    check_float(op, "x", x)
    tokens, cols = x.shape
    torch._check(
        g.dtype == torch.float32 and tuple(g.shape) == (cols, cols),
        lambda: (
            f"quantkit::{op}: g must be torch.float32 [{cols}, {cols}], x's columns squared, "
            f"got {g.dtype} {list(g.shape)}"
        ),
    )
    torch._check(g.is_contiguous(), lambda: f"quantkit::{op}: g must be contiguous, got strides {list(g.stride())}")
    if mask is not None:
        torch._check(
            mask.dtype == torch.bool and tuple(mask.shape) == (tokens,),
            lambda: (
                f"quantkit::{op}: mask must be torch.bool [{tokens}], a number per token, "
                f"got {mask.dtype} {list(mask.shape)}"
            ),
        )
    if channels is not None:
        torch._check(
            channels.dtype == torch.float32 and tuple(channels.shape) == (3, cols),
            lambda: (
                f"quantkit::{op}: channels must be torch.float32 [3, {cols}], "
                f"got {channels.dtype} {list(channels.shape)}"
            ),
        )
        torch._check(
            channels.is_contiguous(),
            lambda: f"quantkit::{op}: channels must be contiguous, got strides {list(channels.stride())}",
        )


def _fake(x: Tensor, mask: Tensor | None, g: Tensor, channels: Tensor | None) -> None:
    _check(x, mask, g, channels)


def _reference(x: Tensor, mask: Tensor | None, g: Tensor, channels: Tensor | None) -> None:
    _check(x, mask, g, channels)
    wide = x.float() if mask is None else x[mask].float()
    g.addmm_(wide.T, wide)
    _take_in(wide, channels)


def _take_in(wide: Tensor, channels: Tensor | None) -> None:
    if channels is not None and len(wide):
        torch.minimum(channels[0], wide.amin(0), out=channels[0])
        torch.maximum(channels[1], wide.amax(0), out=channels[1])
        channels[2] += wide.abs().sum(0)


_accumulate = declare(
    "gram_accumulate(Tensor x, Tensor? mask, Tensor(a!) g, Tensor(b!)? channels) -> ()",
    fake=_fake,
    reference=_reference,
)


def gram_accumulate(x: Tensor, g: Tensor, *, mask: Tensor | None = None, channels: Tensor | None = None) -> None:
    """g += x^T x, in place. x [tokens, K] fp32, fp16 or bf16; g fp32 [K, K], symmetric.

    `mask` bool [tokens] says which tokens count (True); without one, all do. `channels` fp32 [3, K] takes in, in the
    same pass over x, each column's least and greatest number and the sum of its magnitudes: it starts as inf, -inf, 0.

    Products and sums are fp32. Only the upper half is computed and then mirrored: all of g is valid on return, and
    exactly symmetric. NaN and infinities in column k of x make g[k, k] NaN or infinite, and NaN all three of its
    channels. bf16 numbers below 2^-126 may count as zero.
    """
    _accumulate(x, mask, g, channels)


def _fake_upper(x: Tensor, g: Tensor, channels: Tensor | None, fresh: bool) -> None:
    op = "gram_upper"
    _check(x, None, g, channels, op)
    torch._check(
        not fresh or x.shape[0] > 0, lambda: f"quantkit::{op}: x must have a token to make a fresh g of, got none"
    )


def _reference_upper(x: Tensor, g: Tensor, channels: Tensor | None, fresh: bool) -> None:
    _fake_upper(x, g, channels, fresh)
    wide = x.float()
    gram = wide.T @ wide
    g.copy_((gram if fresh else g + gram).triu())
    _take_in(wide, channels)


_upper = declare(
    "gram_upper(Tensor x, Tensor(a!) g, Tensor(b!)? channels, bool fresh) -> ()",
    fake=_fake_upper,
    reference=_reference_upper,
    kernels=("CPU",),
)


def gram_upper(x: Tensor, g: Tensor, *, channels: Tensor | None = None, fresh: bool = False) -> None:
    """The upper half of what `gram_accumulate` makes of g, bit for bit; below its diagonal g holds nothing of use until
    `mirror_upper`. For sums of many x, of which only the last needs all of g.

    `fresh`: as if g were zeros, whatever it holds; x has at least one token then.
    """
    _upper(x, g, channels, fresh)


def _check_mirror(g: Tensor) -> None:
    op = "mirror_upper"
    torch._check(
        g.dim() == 2 and g.shape[0] == g.shape[1] and g.dtype == torch.float32,
        lambda: f"quantkit::{op}: g must be a square of torch.float32, got {g.dtype} {list(g.shape)}",
    )
    torch._check(g.is_contiguous(), lambda: f"quantkit::{op}: g must be contiguous, got strides {list(g.stride())}")


def _reference_mirror(g: Tensor) -> None:
    _check_mirror(g)
    g.copy_(g.triu() + g.triu(1).T)


_mirror = declare("mirror_upper(Tensor(a!) g) -> ()", fake=_check_mirror, reference=_reference_mirror, kernels=("CPU",))


def mirror_upper(g: Tensor) -> None:
    """The half of g fp32 [K, K] above the diagonal onto the one below it, in place."""
    _mirror(g)
