"""What Linears that servers fuse have in common: NVFP4's global scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import ops

if TYPE_CHECKING:
    from ..plan import Plan


class GlobalScales:
    """NVFP4's global scale of each Linear of a plan: from the largest magnitude in its fused set (q, k and v; gate and
    up), since a server keeps one for all of it.
    """

    def __init__(self, plan: Plan) -> None:
        names = [name for name, module in plan.modules.items() if module.scheme.weights.scales == "nvfp4"]
        self.sets: dict[str, tuple[str, ...]] = {name: (name,) for name in names}
        for members in plan.family.fused_sets(names):
            self.sets |= dict.fromkeys(members, members)
        self.known: dict[str, Tensor] = {}

    def of(self, module: str, weight: Callable[[str], Tensor]) -> Tensor | None:
        """fp32 [1], None for a scheme that has none. `weight` gives a Linear's weight as it is to be quantized, and is
        asked for those of the whole set at its first member.
        """
        if module not in self.sets:
            return None
        if module not in self.known:
            members = self.sets[module]
            largest = [ops.absmax(weight(name), [-1, -1]).amax() for name in members]
            self.known |= dict.fromkeys(members, ops.nvfp4_global_scale(torch.stack(largest).amax()))
        return self.known[module]
