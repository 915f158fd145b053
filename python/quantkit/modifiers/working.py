"""A decoder layer's weights while modifiers work on them: what a transform changed is kept in fp32 until the end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..calibration.layer import Layer
from ..calibration.statistics import Statistics
from ..errors import CalibrationError
from ..models.mappings import Smoothing
from ..models.norms import norm_offset


class Working:
    """`statistics` are of each Linear's input as the weights are now."""

    def __init__(self, layer: Layer, statistics: Mapping[str, Statistics]) -> None:
        self.layer, self.statistics = layer, statistics
        self.masters: dict[str, Tensor] = {}

    def tensor(self, name: str) -> Tensor:
        """The tensor `name` as it is now: fp32 once something has changed it."""
        return self.masters[name] if name in self.masters else self.layer.tensor(name)

    def weight(self, module: str) -> Tensor:
        """`<module>.weight` [out, in] as it is now."""
        return self.tensor(f"{module}.weight")

    def _master(self, name: str) -> Tensor:
        if name not in self.masters:
            self.masters[name] = self.layer.tensor(name).to(torch.float32, copy=True)
        return self.masters[name]

    def inputs_of(self, modules: Iterable[str]) -> dict[int, tuple[Statistics, list[str]]]:
        """The distinct inputs of those of `modules` that have statistics, each with its readers."""
        found: dict[int, tuple[Statistics, list[str]]] = {}
        for module in modules:
            if module in self.statistics:
                seen = self.statistics[module]
                found.setdefault(id(seen), (seen, []))[1].append(module)
        return found

    def smooth(self, place: Smoothing, s: Tensor) -> None:
        """Divide the output of `place.smooth` by s (fp32 [channels], > 0), and multiply its readers' weights by it (by
        `widened` s where they read each channel several times).

        A norm's weight is rounded to its dtype first and s corrected by what that changed, so the layer computes the
        same but for the rounding of fp32. Channels that this leaves without a sign or a value stay as they are.
        """
        inputs = self.inputs_of(place.balance)
        for seen, _ in inputs.values():
            left = [m for m, other in self.statistics.items() if other is seen and m not in place.balance]
            if left:
                raise CalibrationError(
                    f"{left[0]} reads the output of {place.smooth} and is not among the balance layers "
                    f"({', '.join(place.balance[:4])}): smoothing would change what the model computes; add it to the "
                    "mappings"
                )
        name, bias = f"{place.smooth}.weight", f"{place.smooth}.bias"
        if place.kind == "norm":
            offset = norm_offset(self.layer.stored[name][0], place.smooth)
            weight = self.tensor(name).float()
            stored = ((weight + offset) / s - offset).to(self.layer.tensor(name).dtype).float()
            exact = (weight + offset) / (stored + offset)
            works = torch.isfinite(exact) & (exact > 0)
            s = torch.where(works, exact, torch.ones_like(s))
            self.masters[name] = torch.where(works, stored, weight)
        else:
            self._master(name).div_(s[:, None])
        if bias in self.layer.stored:
            self._master(bias).div_(s)
        s = widened(s, place)
        for module in place.balance:
            self._master(f"{module}.weight").mul_(s)
        for seen, _ in inputs.values():
            seen.divide(s)

    def settle(self) -> None:
        """Put what has changed into the layer, in the dtype it had."""
        for name, value in self.masters.items():
            self.layer.put(name, value.to(self.layer.tensor(name).dtype))


def widened(s: Tensor, place: Smoothing) -> Tensor:
    """s [channels of the smooth layer] as its readers' inputs have it: each head of values `repeat` times in turn."""
    return s if place.repeat == 1 else s.view(-1, 1, place.head_dim).expand(-1, place.repeat, -1).reshape(-1)


def narrowed(x: Tensor, place: Smoothing) -> Tensor:
    """x [inputs of the readers] averaged over the inputs that are one channel of the smooth layer."""
    return x if place.repeat == 1 else x.view(-1, place.repeat, place.head_dim).mean(1).reshape(-1)
