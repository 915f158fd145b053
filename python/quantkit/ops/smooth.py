"""Scales that move the difficulty of quantizing from activations to weights (SmoothQuant, arXiv 2211.10438, eq. 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import declare

_OP = "smoothquant_scales"


def _check(activation: Tensor, weight: Tensor, strength: float, minimum: float) -> None:
    torch._check(0.0 <= strength <= 1.0, lambda: f"quantkit::{_OP}: strength must be in [0, 1], got {strength:g}")
    torch._check(
        0.0 < minimum <= 1.0, lambda: f"quantkit::{_OP}: minimum must be above 0 and at most 1, got {minimum:g}"
    )
    for name, x in (("activation", activation), ("weight", weight)):
        torch._check(
            x.dim() == 1 and x.dtype == torch.float32,
            lambda name=name, x=x: f"quantkit::{_OP}: {name} must be float32 [channels], got {x.dtype} {list(x.shape)}",
        )
    torch._check(
        activation.shape == weight.shape,
        lambda: f"quantkit::{_OP}: weight {list(weight.shape)} must have activation's shape {list(activation.shape)}",
    )


def _fake(activation: Tensor, weight: Tensor, strength: float, minimum: float) -> Tensor:
    _check(activation, weight, strength, minimum)
    return activation.new_empty(activation.shape)


def _reference(activation: Tensor, weight: Tensor, strength: float, minimum: float) -> Tensor:
    _check(activation, weight, strength, minimum)
    for name, x in (("activation", activation), ("weight", weight)):
        torch._check(
            bool((x.isfinite() & (x >= 0)).all()),
            lambda name=name: f"quantkit::{_OP}: {name} must be finite and not negative",
        )
    a, w = activation.double(), weight.double()
    ratio = (a**strength / w ** (1.0 - strength)).clamp(minimum, torch.finfo(torch.float32).max)
    return torch.where((a == 0) | (w == 0), 1.0, ratio).float()


_scales = declare(
    "smoothquant_scales(Tensor activation, Tensor weight, float strength, float minimum) -> Tensor",
    fake=_fake,
    reference=_reference,
)


def smoothquant_scales(activation: Tensor, weight: Tensor, strength: float = 0.5, minimum: float = 1e-5) -> Tensor:
    """s = activation^strength / weight^(1 - strength), at least `minimum`; divide activations by it.

    activation, weight: the largest magnitude of each channel, fp32 [K]; the result is too. A channel whose
    activations or weights are all zero has nothing to balance and gets 1. The result is finite.
    RuntimeError: a value that is negative, NaN or infinite; `strength` outside [0, 1]; `minimum` outside (0, 1].
    """
    return _scales(activation, weight, strength, minimum)
