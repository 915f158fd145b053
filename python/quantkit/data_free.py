"""Recipes that need no data: every weight by itself, in the order it lies in the source, without a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from .checkpoint.native import host
from .distributed import ONE, Ranks
from .plan import Plan
from .report.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from .checkpoint.reader import TensorInfo
    from .modifiers.sink import Sink


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


def data_free(
    plan: Plan,
    source: WeightReader,
    sink: Sink,
    *,
    copy: Callable[[str], None] | None = None,
    progress: bool = True,
    ranks: Ranks = ONE,
) -> None:
    """A recipe without data: every weight by itself, in the order it lies in the source. `copy` is called for tensors
    that stay as they are. Of several `ranks` each does the tensors of some of the source's bytes in a row.
    """
    from .modifiers.rtn import quantize_weight
    from .modifiers.shared import GlobalScales

    shared = GlobalScales(plan)
    mine = own_tensors(plan.checkpoint.tensors, ranks)
    total = sum(plan.checkpoint.tensors[name].nbytes for name in mine)
    with Progress("quantize", total=total, unit="B", enabled=progress) as bar:
        for name in mine:
            info = plan.checkpoint.tensors[name]
            module = name.removesuffix(".weight")
            if module != name and module in plan.modules:
                weight, args = source.tensor(name), plan.modules[module].scheme.weights
                dtype, pack = plan.scale_dtype(module), plan.packs(module)
                common = shared.of(module, lambda member: source.tensor(f"{member}.weight"))
                quantized = quantize_weight(module, weight, args, scale_dtype=dtype, pack=pack, global_scale=common)
                sink.weight(module, quantized)
                source.release(name)
                host().release_free_memory()
            elif copy is not None:
                copy(name)
            bar.advance(info.nbytes)
