"""Recipes that need no data: every weight by itself, in the order it lies in the source, without a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from .checkpoint.native import host
from .plan import Plan
from .report.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from .modifiers.sink import Sink


class WeightReader(Protocol):
    """A source whose tensors can be let go of: a checkpoint, or a model in memory."""

    def tensor(self, name: str) -> Tensor: ...
    def release(self, name: str) -> None: ...


def data_free(
    plan: Plan, source: WeightReader, sink: Sink, *, copy: Callable[[str], None] | None = None, progress: bool = True
) -> None:
    """A recipe without data: every weight by itself, in the order it lies in the source. `copy` is called for tensors
    that stay as they are.
    """
    from .modifiers.rtn import quantize_weight
    from .modifiers.shared import GlobalScales

    shared = GlobalScales(plan)
    total = plan.checkpoint.total_bytes
    with Progress("quantize", total=total, unit="B", enabled=progress) as bar:
        for name, info in plan.checkpoint.tensors.items():
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
