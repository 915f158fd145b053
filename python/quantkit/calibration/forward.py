"""Batches through the model without its head: into the first layer, and through one layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CalibrationError
from ..models.fused_block import fused_blocks
from ..models.fused_norm import fused
from ..models.packed_linear import packed
from ..models.skeleton import LayerCall, Skeleton, WeightSource
from .batches import Batch
from .hidden import HiddenStates
from .hooks import BatchRows, CacheRecorder, InputHooks, SeenAll


def embed(
    skeleton: Skeleton, source: WeightSource, batches: Sequence[Batch]
) -> tuple[HiddenStates, list[list[LayerCall]]]:
    """What enters the first layer, and every batch's calls of the layers, shared by unpadded batches of one shape."""
    with skeleton.outer(source, head=False):
        return embedded(skeleton, batches)


def embedded(
    skeleton: Skeleton,
    batches: Sequence[Batch],
    folder: Path | None = None,
    within: tuple[int, int] | None = None,
    *,
    keep: bool = True,
) -> tuple[HiddenStates, list[list[LayerCall]]]:
    """As `embed`, within `skeleton.outer`; `folder` and `within` are those of HiddenStates. Without `keep` its files
    are left as they are, for `HiddenStates.load`.
    """
    hidden = HiddenStates(batches, skeleton.hidden_size, skeleton.dtype, folder=folder, within=within)
    seen: dict[tuple[int, ...], list[LayerCall]] = {}
    calls: list[list[LayerCall]] = []
    for number, batch in enumerate(batches):
        bad = batch.input_ids.max() >= skeleton.vocab_size or batch.input_ids.min() < 0
        if bool(bad):
            raise CalibrationError(
                f"calibration data: token id {int(batch.input_ids.max())} is beyond the model's vocabulary of "
                f"{skeleton.vocab_size}; the tokenizer does not belong to this model"
            )
        entering, layer_calls = skeleton.capture(batch.input_ids, batch.mask)
        if keep:
            hidden.put(number, entering)
        if batch.mask is None:
            layer_calls = seen.setdefault(tuple(batch.input_ids.shape), layer_calls)
        calls.append(layer_calls)
    if keep:
        hidden.turn()
    return hidden, calls


@contextmanager
def faster(skeleton: Skeleton, index: int, batches: Sequence[Batch]) -> Iterator[None]:
    """Within the block, layer `index` runs `batches` by the fastest means."""
    dense = [m for n, m in skeleton.linears(index).items() if not skeleton.family.is_expert(n)]
    # Packing a weight costs about what it saves in one call.
    layer = skeleton.layers[index]
    with packed(dense if len(batches) > 2 else [], batches[0].input_ids.numel()), fused(layer), fused_blocks(layer):
        yield


def forward(
    skeleton: Skeleton,
    index: int,
    batches: Sequence[Batch],
    calls: Sequence[Sequence[LayerCall]],
    hidden: HiddenStates,
    hooks: InputHooks | None = None,
    *,
    keep: bool = True,
    cache: CacheRecorder | None = None,
    of: Sequence[Batch] | None = None,
) -> None:
    """Every batch through layer `index`; outputs replace the inputs if `keep`. If nobody needs outputs, a batch ends
    as soon as `hooks` have seen every input. `batches` may be some `of` all, by which it is decided how they run.
    """
    with faster(skeleton, index, of or batches):
        for number, batch in enumerate(batches):
            rows = BatchRows(batch)
            for experts in skeleton.experts[index]:
                experts.token_mask = rows.mask
            if hooks is not None:
                hooks.begin(rows, number)
            if cache is not None:
                cache.mask = None if batch.mask is None else batch.mask.bool()
            try:
                out = skeleton.forward(index, hidden.view(number), calls[number][index], cache)
            except SeenAll:
                continue
            finally:
                hidden.rest(number)
            if keep:
                hidden.put(number, out)
            elif hooks is not None and cache is None:
                hooks.may_stop()
    if keep:
        hidden.turn()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Those in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(entry)
