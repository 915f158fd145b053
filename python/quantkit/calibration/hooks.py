"""Hooks that gather statistics of what enters Linears and the KV cache while a layer runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..models.experts import Experts
from .batches import Batch
from .statistics import Statistics, Wants


class SeenAll(Exception):
    """Ends a layer's forward behind its last hook."""


class InputHooks:
    """Forward-pre-hooks on Linears that gather statistics of each distinct input once.

    Two Linears share an input if they are called with the same memory while the tensor seen first still lives and has
    not been written to. Names do not matter.
    """

    def __init__(
        self, linears: Mapping[str, nn.Linear], wants: Mapping[str, Wants], experts: Sequence[Experts]
    ) -> None:
        self.linears, self.wants = linears, wants
        self.statistics: dict[str, Statistics] = {}
        self._routed = {module for group in experts for module in group.modules()}
        self._leader: dict[str, str] = {}
        self._live: list[tuple[weakref.ref[Tensor], int, str]] = []
        self._batch = Batch(torch.empty(0, 0), None)
        self._rows: Tensor | None = None
        self._positions = 0
        self._last: str | None = None
        self._newest: str | None = None

    def __enter__(self) -> InputHooks:
        self._handles = [m.register_forward_pre_hook(self._hook(name)) for name, m in self.linears.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def begin(self, batch: Batch, mask: Tensor | None) -> None:
        """Announce the next batch; `mask` (bool, one per position) keeps padding out."""
        self._batch = batch
        self._live.clear()
        self._rows = None if mask is None else mask.nonzero().flatten()
        self._positions = 0 if mask is None else mask.numel()

    def may_stop(self) -> None:
        """Outputs are not needed: raise SeenAll behind the Linear that was called last in the batch just done. Which
        experts are called depends on the data, so layers with experts always run to their end.
        """
        self._last = None if self._routed else self._newest

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._see(name, module, args[0])
            self._newest = name
            if name == self._last:
                raise SeenAll

        return hook

    def _see(self, name: str, module: nn.Module, x: Tensor) -> None:
        leader = self._sharing(x) or name
        if self._leader.setdefault(name, leader) != leader:
            raise CalibrationError(
                f"{name}: shared its input with {self._leader[name]} in one batch and not in another; statistics "
                "cannot be attributed"
            )
        if leader != name:
            self.statistics[name] = self.statistics[leader]
            return
        self._live.append((weakref.ref(x), x._version, name))
        rows = x.reshape(-1, x.shape[-1])
        # Experts are given no padding in the first place.
        if self._rows is not None and module not in self._routed:
            if rows.shape[0] != self._positions:
                raise CalibrationError(
                    f"{name}: input {list(x.shape)} does not have one row per token, so padding cannot be told apart; "
                    "use calibration rows of equal length (plain text, or a lower max_seq_length)"
                )
            rows = rows.index_select(0, self._rows)
        if rows.shape[0] == 0:
            return
        if name not in self.statistics:
            self.statistics[name] = Statistics.empty(rows.shape[1], self.wants[name])
        self.statistics[name].update(rows, lambda: f"{name}, {self._samples(x)}")

    def _samples(self, x: Tensor) -> str:
        """Which calibration rows of the batch make `x` not finite, as far as x tells them apart."""
        index = self._batch.index
        if x.dim() == 3 and x.shape[0] == len(index):
            bad = ~torch.isfinite(x).flatten(1).all(1)
            index = tuple(i for i, wrong in zip(index, bad.tolist(), strict=True) if wrong)
        shown = ", ".join(map(str, index[:8])) + (", ..." if len(index) > 8 else "")
        return f"calibration sample{'s' if len(index) > 1 else ''} {shown}"

    def _sharing(self, x: Tensor) -> str | None:
        for reference, version, name in self._live:
            other = reference()
            if other is None:
                continue
            same = other is x or (
                other.data_ptr() == x.data_ptr()
                and other.numel() == x.numel()
                and other.shape[-1] == x.shape[-1]
                and other.is_contiguous()
                and x.is_contiguous()
            )
            if same and other._version == version:
                return name
        return None


class CacheRecorder:
    """Stands in for a KV cache: gives keys and values back as they came, and keeps each head's largest magnitude."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.mask: Tensor | None = None
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """keys and values [rows, heads, tokens, head size]; `mask` [rows, tokens] keeps padding out."""
        self.key, self.value = self._seen(self.key, keys), self._seen(self.value, values)
        return keys, values

    def _seen(self, before: Tensor | None, x: Tensor) -> Tensor:
        magnitude = x.detach().abs().amax(-1)
        if self.mask is not None:
            magnitude = magnitude.masked_fill(~self.mask[:, None], 0)
        largest = magnitude.amax((0, 2)).float()
        if not bool(torch.isfinite(largest).all()):
            raise CalibrationError(f"{self.where}: NaN or Inf in keys or values; the model does not run in this dtype")
        return largest if before is None else torch.maximum(before, largest)

    def get_seq_length(self, *_: Any) -> int:
        return 0


class CacheRounder(CacheRecorder):
    """Stands in for a KV cache of few bits: gives keys and values back as their codes hold them."""

    def __init__(self, keys: Callable[[Tensor], Tensor], values: Callable[[Tensor], Tensor]) -> None:
        super().__init__("KV cache")
        self.keys, self.values = keys, values

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self.keys(keys), self.values(values)
