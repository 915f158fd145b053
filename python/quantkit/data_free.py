"""Recipes that need no data: every weight by itself, in the order it lies in the source, without a model.

Where source, sink and format take rows, a weight goes through memory in parts of some rows, each read, quantized and
written by one thread while it is in the cache; threads work on different weights. What a run holds is then a part for
each thread, however large the weights are.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from .checkpoint.native import host, kept_memory
from .distributed import ONE, Ranks
from .parallel import each, single_threaded_ops
from .plan import Plan
from .report.progress import Progress
from .startup import quick_imports

if TYPE_CHECKING:
    from torch import Tensor

    from .checkpoint.reader import TensorInfo
    from .modifiers.shared import GlobalScales
    from .modifiers.sink import Sink
    from .quantized import QuantizedTensor

# Bytes of the source in one part, and how far ahead of the threads the disk reads. Parts of 8 MB leave the cache before
# they are written, and a run of 1.4 GB takes 0.6 s instead of 0.2.
PART, AHEAD = 2 << 20, 128 << 20
# Parts begin at multiples of this: rows of a block, and rows whose zero points fill words.
UNIT = 128


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
    """A source that also gives some rows of a tensor: a checkpoint."""

    def rows(self, name: str, begin: int, end: int) -> Tensor: ...
    def prefetch(self, name: str) -> None: ...


@runtime_checkable
class RowSink(Protocol):
    """A sink that also takes some rows of a weight, from `first` on."""

    def part(self, module: str, first: int, quantized: QuantizedTensor) -> None: ...


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
    by_rows = plan.format.BY_ROWS and isinstance(source, RowReader) and isinstance(sink, RowSink)
    ahead = _Ahead(plan, names, source) if isinstance(source, RowReader) else None
    if ahead is not None and names:
        ahead.reach(0)  # before torch is imported
    with quick_imports():
        import torch  # noqa: F401
    total = sum(plan.checkpoint.tensors[name].nbytes for name in names)
    divided = [by_rows and _divisible(plan, _module(plan, name)) for name in names]
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
                _by_rows(plan, module, source, sink)  # type: ignore[arg-type]
            else:
                _whole(plan, module, source, sink, shared)
            if keeper is not None:
                keeper.done(outputs_of(plan, name))
            bar.advance(plan.checkpoint.tensors[name].nbytes)

        if any(divided):
            with single_threaded_ops() as threads, kept_memory():
                each([index for index, yes in enumerate(divided) if yes], one, threads)
        from .modifiers.shared import GlobalScales

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


def _divisible(plan: Plan, module: str | None) -> bool:
    """Whether `module`'s weight can be quantized some rows after the others, but for one range of all of them. Tensors
    that are carried over (None) go in line with these, since they take no memory.
    """
    if module is None:
        return True
    args = plan.modules[module].scheme.weights
    if args.actorder is not None or args.scales != "float":
        return False
    return args.strategy != "tensor" or args.observer not in ("mse", "percentile")


def _by_rows(plan: Plan, module: str, source: RowReader, sink: RowSink) -> None:
    from .modifiers.rtn import quantize_part, tensor_scale

    planned = plan.modules[module]
    name, args, dtype = f"{module}.weight", planned.scheme.weights, plan.scale_dtype(module)
    nbytes = plan.checkpoint.tensors[name].nbytes
    unit = math.lcm(UNIT, max(1, args.block[0]))
    step = max(1, PART // max(1, unit * nbytes // max(1, planned.rows))) * unit

    def parts() -> Iterator[tuple[int, Tensor]]:
        for first in range(0, planned.rows, step):
            yield first, source.rows(name, first, min(first + step, planned.rows))

    scale = tensor_scale(module, parts(), args, planned.rows, scale_dtype=dtype) if args.strategy == "tensor" else None
    pack = plan.packs(module)
    for first, part in parts():
        quantized = quantize_part(
            module, part, args, planned.rows, first=first, scale_dtype=dtype, pack=pack, scale=scale
        )
        sink.part(module, first, quantized)
