"""Recipes that need no data: every weight by itself, in the order it lies in the source, without a model.

Where source, sink and format take rows, `_host` takes a weight from file to file in parts of some rows, each read,
quantized and written by one thread while it is in the cache; threads work on different weights. What a run holds is
then a part for each thread, however large the weights are, and torch, whose import takes as long as 2 GB, is not
imported. All other weights go through torch's memory as a whole, one after the other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from .checkpoint.native import host
from .distributed import ONE, Ranks
from .formats.rows import by_rows
from .parallel import each, thread_count, use_threads
from .plan import Plan
from .report.progress import Progress
from .startup import quick_imports

if TYPE_CHECKING:
    from torch import Tensor

    from ._host import Weight
    from .checkpoint.reader import TensorInfo
    from .modifiers.shared import GlobalScales
    from .modifiers.sink import Sink

# How far ahead of the threads the disk reads, in bytes.
AHEAD = 128 << 20


def own_tensors(tensors: Mapping[str, TensorInfo], ranks: Ranks) -> list[str]:
    """Those of this rank, of about as many bytes as any other's. All of a module go to one rank."""
    total, begin, owner, found = max(1, sum(info.nbytes for info in tensors.values())), 0, dict[str, int](), []
    for name, info in tensors.items():
        rank = owner.setdefault(name.rpartition(".")[0], begin * ranks.world // total)
        begin += info.nbytes
        if rank == ranks.rank:
            found.append(name)
    return found


class WeightReader(Protocol):
    """A source whose tensors can be let go of: a checkpoint, or a model in memory."""

    def tensor(self, name: str) -> Tensor: ...
    def release(self, name: str) -> None: ...


@runtime_checkable
class RowReader(Protocol):
    """A source whose files `_host` reads: a checkpoint."""

    def stored_weight(self, name: str) -> Weight: ...
    def reading(self, name: str) -> AbstractContextManager[None]: ...
    def prefetch(self, name: str) -> None: ...


@runtime_checkable
class RowSink(Protocol):
    """A sink that also rounds a weight on its way into files: a checkpoint's."""

    def rounded(self, module: str, weight: Weight) -> None:
        """Round it to nearest. CheckpointError, with the rows, if it has NaN or Inf. From any thread."""
        ...


class Keeper(Protocol):
    """Knows which tensors of the output an earlier process has done, and hears of those that are done now."""

    def has(self, names: Iterable[str]) -> bool:
        """Whether all of them were done."""
        ...

    def done(self, names: Iterable[str]) -> None:
        """All of them have been given to the sink; a later process does all of them again, or none. Any thread."""
        ...


def outputs_of(plan: Plan, name: str) -> list[str]:
    """What the source's tensor `name` becomes in the output."""
    module = _module(plan, name)
    if module is None:
        return [name]
    planned = plan.modules[module]
    stored = plan.format.stored_tensors(module, planned.scheme, planned.rows, planned.cols, planned.dtype)
    return [tensor.name for tensor in stored]


def data_free(
    plan: Plan,
    source: WeightReader,
    sink: Sink,
    *,
    copy: Callable[[str], None] | None = None,
    progress: bool = True,
    ranks: Ranks = ONE,
    keeper: Keeper | None = None,
) -> None:
    """A recipe without data: every weight by itself, in the order it lies in the source. `copy` is called for tensors
    that stay as they are. Of several `ranks` each does the tensors of some of the source's bytes in a row;
    `keeper`, which goes with a `copy`, tells what need not be done again.
    """
    names = own_tensors(plan.checkpoint.tensors, ranks)
    if keeper is not None:
        names = [name for name in names if not keeper.has(outputs_of(plan, name))]
    from_files = isinstance(source, RowReader) and isinstance(sink, RowSink)
    ahead = _Ahead(plan, names, source) if isinstance(source, RowReader) else None
    if ahead is not None and names:
        ahead.reach(0)
    total = sum(plan.checkpoint.tensors[name].nbytes for name in names)
    divided = [from_files and _divisible(plan, name) for name in names]
    with Progress("quantize", total=total, unit="B", enabled=progress) as bar:

        def one(index: int) -> None:
            name = names[index]
            if ahead is not None:
                ahead.reach(index)
            module = _module(plan, name)
            if module is None:
                if copy is not None:
                    copy(name)
            elif divided[index]:
                _by_rows(module, source, sink)  # type: ignore[arg-type]
            else:
                _whole(plan, module, source, sink, shared)
            if keeper is not None:
                keeper.done(outputs_of(plan, name))
            bar.advance(plan.checkpoint.tensors[name].nbytes)

        wanted = plan.config.global_.num_threads
        each([index for index, yes in enumerate(divided) if yes], one, wanted or thread_count())
        if all(divided):
            return
        with quick_imports():
            from .modifiers.shared import GlobalScales
        use_threads(wanted)
        shared = GlobalScales(plan)
        for index, yes in enumerate(divided):
            if not yes:
                one(index)


def _module(plan: Plan, name: str) -> str | None:
    """The module to quantize whose weight is the source's tensor `name`."""
    module = name.removesuffix(".weight")
    return module if module != name and module in plan.modules else None


class _Ahead:
    """Lets the disk read the weights that come next: so many bytes of them, or one."""

    def __init__(self, plan: Plan, names: list[str], source: RowReader) -> None:
        self._names = [name if _module(plan, name) is not None else None for name in names]
        sizes = (
            plan.checkpoint.tensors[name].nbytes if kept else 0 for name, kept in zip(names, self._names, strict=True)
        )
        self._ends = list(accumulate(sizes))
        self._next, self._source, self._lock = 0, source, threading.Lock()

    def reach(self, index: int) -> None:
        """Work on tensor `index` begins."""
        with self._lock:
            limit, begin = self._ends[index] + AHEAD, self._next
            while self._next < len(self._names) and (self._next <= index + 1 or self._ends[self._next] <= limit):
                self._next += 1
            found = self._names[begin : self._next]
        for name in found:
            if name is not None:
                self._source.prefetch(name)


def _whole(plan: Plan, module: str, source: WeightReader, sink: Sink, shared: GlobalScales) -> None:
    from .modifiers.rtn import quantize_weight

    name, args = f"{module}.weight", plan.modules[module].scheme.weights
    dtype, pack = plan.scale_dtype(module), plan.packs(module)
    common = shared.of(module, lambda member: source.tensor(f"{member}.weight"))
    weight = source.tensor(name)
    sink.weight(module, quantize_weight(module, weight, args, scale_dtype=dtype, pack=pack, global_scale=common))
    source.release(name)
    host().release_free_memory()


def _divisible(plan: Plan, name: str) -> bool:
    """Whether the source's tensor `name` goes into the output without taking memory for all of it: copied by the
    kernel, or rounded by rows.
    """
    module = _module(plan, name)
    if module is None:
        return name not in plan.checkpoint.remade
    if name in plan.checkpoint.gathered:
        return False
    planned = plan.modules[module]
    return by_rows(plan.format, module, planned.scheme, planned.rows, planned.cols) is not None


def _by_rows(module: str, source: RowReader, sink: RowSink) -> None:
    name = f"{module}.weight"
    with source.reading(name):
        sink.rounded(module, source.stored_weight(name))
