"""Hooks that gather statistics of what enters Linears and the KV cache while a layer runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import Ranks
from ..errors import CalibrationError
from ..models.experts import Experts
from .batches import Batch
from .statistics import Statistics, Wants
from .tree import Leaves, Sums, total


class SeenAll(Exception):
    """Ends a layer's forward behind its last hook."""


class BatchRows:
    """A batch as Linears see it: which rows of an input are real tokens, and what they are called in an error."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.mask = None if batch.mask is None else batch.mask.reshape(-1).bool()
        self._real = None if self.mask is None else self.mask.nonzero().flatten()

    def of(self, x: Tensor, name: str) -> Tensor:
        """The rows [tokens, channels] of x [..., channels], the input of `name`, that are real tokens."""
        rows = x.reshape(-1, x.shape[-1])
        if self._real is None or self.mask is None:
            return rows
        if rows.shape[0] != self.mask.numel():
            raise CalibrationError(
                f"{name}: input {list(x.shape)} does not have one row per token, so padding cannot be told apart; "
                "use calibration rows of equal length (plain text, or a lower max_seq_length)"
            )
        return rows.index_select(0, self._real)

    def samples(self, x: Tensor) -> str:
        """Which calibration rows of the batch make `x` not finite, as far as x tells them apart."""
        index = self.batch.index
        if x.dim() == 3 and x.shape[0] == len(index):
            bad = ~torch.isfinite(x).flatten(1).all(1)
            index = tuple(i for i, wrong in zip(index, bad.tolist(), strict=True) if wrong)
        shown = ", ".join(map(str, index[:8])) + (", ..." if len(index) > 8 else "")
        return f"calibration sample{'s' if len(index) > 1 else ''} {shown}"


class Sharing:
    """Tells tensors apart. Two are the same if they are the same memory while the one seen first still lives and has
    not been written to. Names do not matter.
    """

    def __init__(self) -> None:
        self._live: list[tuple[weakref.ref[Tensor], int, str]] = []

    def clear(self) -> None:
        """Forget all that was seen."""
        self._live.clear()

    def first(self, name: str, x: Tensor) -> str:
        """Under which name x was seen first: `name` if it is new."""
        for reference, version, seen in self._live:
            other = reference()
            if other is not None and other._version == version and _same_memory(other, x):
                return seen
        self._live.append((weakref.ref(x), x._version, name))
        return name


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a is b or (
        a.data_ptr() == b.data_ptr()
        and a.numel() == b.numel()
        and a.shape[-1] == b.shape[-1]
        and a.is_contiguous()
        and b.is_contiguous()
    )


class InputHooks:
    """Forward-pre-hooks on Linears that gather statistics of each distinct input once; see `Sharing`. Batches are those
    of `leaves`; experts' inputs are added up batch by batch.
    """

    def __init__(
        self,
        linears: Mapping[str, nn.Linear],
        wants: Mapping[str, Wants],
        experts: Sequence[Experts],
        leaves: Leaves,
    ) -> None:
        self.linears, self.wants, self.leaves = linears, wants, leaves
        self.sums: dict[str, Statistics | Sums] = {}
        self._routed = {module for group in experts for module in group.modules()}
        self._leader: dict[str, str] = {}
        # Experts apart: where they see all tokens, others that read the same may be called with padding, too.
        self._sharing = {True: Sharing(), False: Sharing()}
        self._rows, self._number = BatchRows(Batch(torch.empty(0, 0), None)), 0
        self._last: str | None = None
        self._newest: str | None = None

    def __enter__(self) -> InputHooks:
        self._handles = [m.register_forward_pre_hook(self._hook(name)) for name, m in self.linears.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def begin(self, rows: BatchRows, index: int) -> None:
        """Announce the next batch, the `index`-th of those that are run here."""
        self._rows, self._number = rows, self.leaves.numbers[index]
        for sharing in self._sharing.values():
            sharing.clear()

    def statistics(self, ranks: Ranks) -> dict[str, Statistics]:
        """Of the input of each Linear that had any on any rank, once all batches have been; no more may come."""
        leaders: dict[str, str] = {}
        for theirs in ranks.gather(self._leader):
            for name, leader in theirs.items():
                self._require_same(name, leaders.setdefault(name, leader), leader)
        found = self._of_experts(ranks)
        for name in self.linears:
            if leaders.get(name) != name or self.linears[name] in self._routed:
                continue
            seen = self.sums.get(name)
            whole = total(seen.parts() if isinstance(seen, Sums) else [], ranks)
            if whole is not None:
                found[name] = whole
        return {name: found[leader] for name, leader in leaders.items() if leader in found}

    def _of_experts(self, ranks: Ranks) -> dict[str, Statistics]:
        """What each rank's batches gave experts, by leader. Sums of floats depend on their order, so several ranks have
        ranges and counts alone: see `whole_experts`.
        """
        found: dict[str, Statistics] = {}
        mine = {name: seen for name, seen in self.sums.items() if isinstance(seen, Statistics)}
        for theirs in ranks.gather(mine):
            for name, seen in theirs.items():
                assert ranks.world == 1 or seen.gram is None
                if name in found:
                    found[name].merge(seen)
                else:
                    found[name] = seen.complete()
        return found

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

    @staticmethod
    def _require_same(name: str, leader: str, now: str) -> None:
        if leader != now:
            raise CalibrationError(
                f"{name}: shared its input with {leader} in one batch and not in another; statistics cannot be "
                "attributed"
            )

    def _see(self, name: str, module: nn.Module, x: Tensor) -> None:
        # Experts are given no padding in the first place.
        routed = module in self._routed
        leader = self._sharing[routed].first(name, x)
        self._require_same(name, self._leader.setdefault(name, leader), leader)
        if leader != name:
            return
        rows = x.reshape(-1, x.shape[-1]) if routed else self._rows.of(x, name)
        if rows.shape[0] == 0:
            return
        if name not in self.sums:
            wants = self.wants[name]
            self.sums[name] = Statistics.empty(rows.shape[1], wants) if routed else Sums(self.leaves, wants)
        seen = self.sums[name]
        if isinstance(seen, Sums):
            seen.update(self._number, rows, lambda: f"{name}, {self._rows.samples(x)}")
        else:
            seen.update(rows, lambda: f"{name}, {self._rows.samples(x)}")


class CacheRecorder:
    """Stands in for a KV cache: gives keys and values back as they came, and keeps the largest magnitude of each of
    their channels: fp32 [heads, head size]. `see` does so with queries, if they are `wanted`.
    """

    def __init__(self, where: str, wanted: bool = False) -> None:
        self.where, self.wanted = where, wanted
        self.mask: Tensor | None = None
        self.key: Tensor | None = None
        self.value: Tensor | None = None
        self.query: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """keys and values [rows, heads, tokens, head size]; `mask` [rows, tokens] keeps padding out."""
        self.key, self.value = self._seen(self.key, keys), self._seen(self.value, values)
        return keys, values

    def see(self, queries: Tensor) -> Tensor:
        """queries [rows, heads, tokens, head size] as attention gets them."""
        self.query = self._seen(self.query, queries)
        return queries

    def _seen(self, before: Tensor | None, x: Tensor) -> Tensor:
        magnitude = x.detach().abs()
        if self.mask is not None:
            magnitude = magnitude.masked_fill(~self.mask[:, None, :, None], 0)
        largest = magnitude.amax((0, 2)).float()
        if not bool(torch.isfinite(largest).all()):
            what = "queries, keys or values"
            raise CalibrationError(f"{self.where}: NaN or Inf in {what}; the model does not run in this dtype")
        return largest if before is None else torch.maximum(before, largest)

    @property
    def kept(self) -> dict[str, Tensor]:
        """What there is of `key`, `value` and `query`."""
        found = {"key": self.key, "value": self.value, "query": self.query}
        return {part: largest for part, largest in found.items() if largest is not None}

    def heads(self) -> dict[str, Tensor]:
        """`kept` of each head: fp32 [heads]."""
        return {part: largest.amax(1) for part, largest in self.kept.items()}

    def merge(self, kept: Mapping[str, Tensor]) -> None:
        """Take in what another one kept."""
        for part, largest in kept.items():
            mine = getattr(self, part)
            setattr(self, part, largest if mine is None else torch.maximum(mine, largest))

    def get_seq_length(self, *_: Any) -> int:
        return 0


class CacheRounder(CacheRecorder):
    """Stands in for a KV cache of few bits: gives keys and values back as their codes hold them."""

    def __init__(self, keys: Callable[[Tensor], Tensor], values: Callable[[Tensor], Tensor]) -> None:
        super().__init__("KV cache")
        self.keys, self.values = keys, values

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self.keys(keys), self.values(values)
