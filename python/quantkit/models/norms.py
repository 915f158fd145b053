"""What a norm does with its weight, asked of the norm itself: the name of its class tells nothing."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..errors import CalibrationError


def norm_offset(norm: nn.Module, name: str) -> float:
    """What `norm`, module `name`, adds to its weight before it multiplies: 0 or 1. CalibrationError otherwise."""
    weight = norm.weight
    assert isinstance(weight, Tensor)
    x = torch.linspace(-1, 2, weight.shape[0], dtype=weight.dtype)[None, None]
    for offset in (0.0, 1.0):
        alone = copy.copy(norm)  # without hooks, and as its class computes it
        tensors = {key: torch.zeros_like(value) for key, value in norm.named_parameters()}
        tensors["weight"] = torch.full_like(weight, -offset)
        alone._parameters = {key: nn.Parameter(value, requires_grad=False) for key, value in tensors.items()}
        try:
            out = type(norm).forward(alone, x)
        except (TypeError, RuntimeError) as error:
            raise CalibrationError(f"{name}: cannot be smoothed, for it does not run alone ({error})") from error
        if not bool(out.any()):
            return offset
    raise CalibrationError(
        f"{name}: cannot be smoothed: {type(norm).__name__} multiplies neither by its weight nor by 1 + its weight"
    )
