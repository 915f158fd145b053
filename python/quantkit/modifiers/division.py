"""Work within a layer, shared out over ranks: rows of a dense Linear, whole experts, by cost. All have all results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ..config.schemes import QuantizationArgs
from ..distributed import Ranks
from ..quantized import QuantizedTensor

if TYPE_CHECKING:
    from .sink import Sink

# Rows are shared out in panels of so many, as many as the kernels take at once.
PANEL = 16
T = TypeVar("T")


def row_counts(rows: int, ranks: Ranks) -> list[int]:
    """How many of `rows` in a row each rank works on."""
    panels = -(-rows // PANEL)
    ends = [min(rows, ranks.share(panels, rank)[1] * PANEL) for rank in range(ranks.world)]
    return [end - begin for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


def own_rows(rows: int, ranks: Ranks) -> slice:
    """Those of this rank."""
    counts = row_counts(rows, ranks)
    begin = sum(counts[: ranks.rank])
    return slice(begin, begin + counts[ranks.rank])


def owners(costs: Sequence[float], ranks: Ranks) -> list[int]:
    """A rank for each piece of work, the dearest first to whoever has least to do."""
    loads, found = [0.0] * ranks.world, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        found[i] = min(range(ranks.world), key=lambda r: loads[r])
        loads[found[i]] += costs[i]
    return found


@dataclass(frozen=True)
class _Place:
    """Where in a message a tensor is, and what it is like."""

    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def gathered(own: Mapping[str, T], ranks: Ranks) -> dict[str, T]:
    """What every rank made, dataclasses that hold tensors: small things are pickled, tensors sent as they are."""
    if ranks.world == 1:
        return dict(own)
    tensors: list[Tensor] = []
    light = ranks.gather({name: _without(value, tensors) for name, value in own.items()})
    incoming: list[list[Tensor]] = []
    for theirs in light:
        places: list[_Place] = []
        for value in theirs.values():
            _places(value, places)
        incoming.append([torch.empty(p.shape, dtype=p.dtype) for p in places])
    ranks.exchange([tensors] * ranks.world, incoming)
    found: dict[str, T] = {}
    for theirs, arrived in zip(light, incoming, strict=True):
        found.update({name: _with(value, arrived) for name, value in theirs.items()})
    return found


def _without(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value.contiguous())
        return _Place(len(tensors) - 1, tuple(value.shape), value.dtype)
    if is_dataclass(value) and not isinstance(value, QuantizationArgs):
        changed = {f.name: _without(getattr(value, f.name), tensors) for f in fields(value)}
        return replace(value, **changed)  # type: ignore[type-var]
    return value


def _places(value: Any, places: list[_Place]) -> None:
    if isinstance(value, _Place):
        places.append(value)
    elif is_dataclass(value) and not isinstance(value, QuantizationArgs):
        for f in fields(value):
            _places(getattr(value, f.name), places)


def _with(value: Any, tensors: Sequence[Tensor]) -> Any:
    if isinstance(value, _Place):
        return tensors[value.index]
    if is_dataclass(value) and not isinstance(value, QuantizationArgs):
        return replace(value, **{f.name: _with(getattr(value, f.name), tensors) for f in fields(value)})  # type: ignore[type-var]
    return value


class OwnSink:
    """Passes on to `inner` what this rank is to write: of the modules in `names`, every N-th, or as `assign` says; rank
    0 takes all else.
    """

    def __init__(self, inner: Sink, names: Sequence[str], ranks: Ranks) -> None:
        self._inner, self._ranks = inner, ranks
        self._owner = {name: i % ranks.world for i, name in enumerate(names)}

    def assign(self, owners: Mapping[str, int]) -> None:
        """Which rank writes these modules."""
        self._owner.update(owners)

    def _own(self, module: str) -> bool:
        return self._owner.get(module, 0) == self._ranks.rank

    def weight(self, module: str, quantized: QuantizedTensor) -> None:
        if self._own(module):
            self._inner.weight(module, quantized)

    def input(self, module: str, scale: Tensor, zero_point: Tensor | None) -> None:
        if self._own(module):
            self._inner.input(module, scale, zero_point)

    def tensor(self, name: str, value: Tensor) -> None:
        if self._own(name.rpartition(".")[0]):
            self._inner.tensor(name, value)

    def query(self, attention: str, scale: Tensor) -> None:
        if self._ranks.first:
            self._inner.query(attention, scale)

    def cache(self, attention: str, key_scale: Tensor, value_scale: Tensor) -> None:
        if self._ranks.first:
            self._inner.cache(attention, key_scale, value_scale)
