"""SmoothQuant (Xiao et al., 2022, eq. 4): per channel, s = max|x|^strength / max|w|^(1 - strength)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..config.recipe import SmoothQuantModifier
from ..errors import CalibrationError
from ..models.mappings import Smoothing
from .working import Working

# llm-compressor's floor of s.
MINIMUM = 1e-5


def scales(modifier: SmoothQuantModifier, place: Smoothing, working: Working) -> Tensor:
    """s (fp32 [channels]) for one place: from all readers' inputs and weights."""
    inputs = [seen.absmax for seen, _ in working.inputs_of(place.balance).values()]
    activation = torch.stack(inputs).amax(0)
    if place.repeat > 1:
        raise CalibrationError(
            f"{place.smooth}: its heads are shared by several query heads (grouped-query attention); SmoothQuant "
            "smooths norms, leave this mapping out"
        )
    if modifier.algorithm == "log_equalization":
        found = activation / torch.log2(2 + activation)
        return torch.where(activation > 0, found, torch.ones_like(found)).clamp(min=MINIMUM)
    weights = [ops.absmax(working.weight(module), [-1, 1]).reshape(-1) for module in place.balance]
    return ops.smoothquant_scales(
        activation, torch.stack(weights).amax(0), modifier.smoothing_strength, minimum=MINIMUM
    )
