"""One pass over the decoder layers that collects what the inputs of their Linears are like.

Per layer: load, let the visitor prepare (and quantize, if its codes do not depend on data), run every batch once with
hooks, hand the statistics to the visitor, drop. The outputs are the next layer's inputs, in place. A visitor whose
codes depend on the statistics asks for a second forward, which makes these inputs with the weights it left.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import CalibrationError
from ..models.experts import Experts
from ..models.packed_linear import packed
from ..models.skeleton import LayerCall, Skeleton, WeightSource
from ..report.progress import Progress
from .batches import Batch, HiddenStates
from .statistics import Statistics


@dataclass(frozen=True)
class Layer:
    """A decoder layer with its weights in memory, or the head as a layer of its own (`index` = number of layers).
    `linears` holds its Linears by their checkpoint names.
    """

    index: int
    prefix: str
    linears: Mapping[str, nn.Linear]


class Visitor(Protocol):
    """What is done to each layer. `second_forward`: `finish` changes weights, and the next layer is to see that."""

    second_forward: bool

    def prepare(self, layer: Layer) -> None:
        """Before the forward. May put other weights into `layer.linears` (`linear.weight = nn.Parameter(...)`)."""
        ...

    def finish(self, layer: Layer, statistics: Mapping[str, Statistics]) -> None:
        """After the forward, with the statistics of each wanted Linear's input. Linears that read the same tensor have
        the very same object.
        """
        ...


@dataclass
class SweepReport:
    """What a sweep saw: tokens, and the experts' Linears whose input was borrowed because no token reached them."""

    tokens: int
    silent_experts: list[str] = field(default_factory=list)


def sweep(
    skeleton: Skeleton,
    source: WeightSource,
    batches: Sequence[Batch],
    visitor: Visitor,
    modules: Collection[str],
    *,
    progress: bool = True,
) -> SweepReport:
    """Run the calibration `batches` through the model, layer by layer, and hand `visitor` the statistics of the inputs
    of `modules` (checkpoint names of Linears, the head included). Layers behind the last one with such a Linear are
    not run.

    Raises CalibrationError for NaN or Inf, naming layer, module and batch. An expert that no token reached gets the
    merged statistics of its layer's other experts; it is in the report, and said aloud.
    """
    wanted = frozenset(modules)
    report = SweepReport(sum(batch.tokens for batch in batches))
    by_layer = [[n for n in skeleton.linears(i) if n in wanted] for i in range(skeleton.num_layers)]
    head = skeleton.checkpoint_name("lm_head")
    unknown = wanted.difference([head], *by_layer)
    if unknown:
        raise CalibrationError(f"no Linear of {skeleton.folder} is named {', '.join(sorted(unknown)[:5])}")
    stop = skeleton.num_layers if head in wanted else max((i + 1 for i, n in enumerate(by_layer) if n), default=0)
    if not stop:
        return report
    with torch.no_grad(), Progress("calibrate", total=stop, unit="layer", enabled=progress) as bar:
        hidden, calls = embed(skeleton, source, batches)
        for index in range(stop):
            skeleton.materialize(index, source)
            layer = Layer(index, skeleton.layer_prefix(index), skeleton.linears(index))
            visitor.prepare(layer)
            hooks = InputHooks({name: layer.linears[name] for name in by_layer[index]}, skeleton.experts[index])
            feeds_on = index + 1 < stop or head in wanted
            with hooks:
                forward(skeleton, index, batches, calls, hidden, hooks, keep=feeds_on and not visitor.second_forward)
            visitor.finish(layer, _complete(layer, by_layer[index], hooks.statistics, skeleton, report))
            if visitor.second_forward and feeds_on:
                forward(skeleton, index, batches, calls, hidden)
            skeleton.drop(index, source)
            bar.advance(1)
        if head in wanted:
            _head(skeleton, source, batches, hidden, visitor, head)
    return report


def embed(
    skeleton: Skeleton, source: WeightSource, batches: Sequence[Batch]
) -> tuple[HiddenStates, list[list[LayerCall]]]:
    """What enters the first layer, and every batch's calls of the layers, shared by unpadded batches of one shape."""
    hidden = HiddenStates(batches, skeleton.hidden_size, skeleton.dtype)
    seen: dict[tuple[int, ...], list[LayerCall]] = {}
    calls: list[list[LayerCall]] = []
    with skeleton.outer(source, head=False):
        for batch, view in zip(batches, hidden.views, strict=True):
            bad = batch.input_ids.max() >= skeleton.vocab_size or batch.input_ids.min() < 0
            if bool(bad):
                raise CalibrationError(
                    f"calibration data: token id {int(batch.input_ids.max())} is beyond the model's vocabulary of "
                    f"{skeleton.vocab_size}; the tokenizer does not belong to this model"
                )
            embedded, layer_calls = skeleton.capture(batch.input_ids, batch.mask)
            view.copy_(embedded)
            if batch.mask is None:
                layer_calls = seen.setdefault(tuple(batch.input_ids.shape), layer_calls)
            calls.append(layer_calls)
    return hidden, calls


def forward(
    skeleton: Skeleton,
    index: int,
    batches: Sequence[Batch],
    calls: Sequence[Sequence[LayerCall]],
    hidden: HiddenStates,
    hooks: InputHooks | None = None,
    *,
    keep: bool = True,
) -> None:
    """Every batch through layer `index`; outputs replace the inputs if `keep`. If nobody needs outputs, a batch ends
    as soon as `hooks` have seen every input.
    """
    dense = [m for n, m in skeleton.linears(index).items() if not skeleton.family.is_expert(n)]
    # Packing a weight costs about what it saves in one call.
    with packed(dense if len(batches) > 2 else [], batches[0].input_ids.numel()):
        for number, (batch, view) in enumerate(zip(batches, hidden.views, strict=True)):
            mask = None if batch.mask is None else batch.mask.reshape(-1).bool()
            for experts in skeleton.experts[index]:
                experts.token_mask = mask
            if hooks is not None:
                hooks.begin(number, mask)
            try:
                out = skeleton.forward(index, view, calls[number][index])
            except _SeenAll:
                continue
            if keep:
                view.copy_(out)
            elif hooks is not None:
                hooks.may_stop()


class _SeenAll(Exception):
    """Ends a layer's forward behind its last hook."""


class InputHooks:
    """Forward-pre-hooks on Linears that gather statistics of each distinct input once.

    Two Linears share an input if they are called with the same memory while the tensor seen first still lives and has
    not been written to. Names do not matter.
    """

    def __init__(self, linears: Mapping[str, nn.Linear], experts: Sequence[Experts]) -> None:
        self.linears = linears
        self.statistics: dict[str, Statistics] = {}
        self._routed = {module for group in experts for module in group.modules()}
        self._leader: dict[str, str] = {}
        self._live: list[tuple[weakref.ref[Tensor], int, str]] = []
        self._batch = 0
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

    def begin(self, batch: int, mask: Tensor | None) -> None:
        """Announce the next batch; `mask` (bool, one per position) keeps padding out."""
        self._batch = batch
        self._live.clear()
        self._rows = None if mask is None else mask.nonzero().flatten()
        self._positions = 0 if mask is None else mask.numel()

    def may_stop(self) -> None:
        """Outputs are not needed: raise _SeenAll behind the Linear that was called last in the batch just done. Which
        experts are called depends on the data, so layers with experts always run to their end.
        """
        self._last = None if self._routed else self._newest

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._see(name, module, args[0])
            self._newest = name
            if name == self._last:
                raise _SeenAll

        return hook

    def _see(self, name: str, module: nn.Module, x: Tensor) -> None:
        leader = self._sharing(x) or name
        if self._leader.setdefault(name, leader) != leader:
            raise CalibrationError(
                f"{name}: shared its input with {self._leader[name]} in one batch and not in batch {self._batch}; "
                "statistics cannot be attributed"
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
        seen = Statistics.of(rows, f"{name}, batch {self._batch}")
        if name in self.statistics:
            self.statistics[name].merge(seen)
        else:
            self.statistics[name] = seen

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


def _complete(
    layer: Layer,
    names: Sequence[str],
    statistics: dict[str, Statistics],
    skeleton: Skeleton,
    report: SweepReport,
) -> dict[str, Statistics]:
    """The statistics of every wanted Linear; silent experts borrow from the layer's others, by the same projection."""
    silent = [name for name in names if name not in statistics]
    borrowed: dict[tuple[str, str], Statistics] = {}
    for name in silent:
        if not skeleton.family.is_expert(name):
            raise CalibrationError(f"{name}: the model's forward never calls this Linear, so its input is unknown")
        experts, _, part = name.rpartition(".experts.")
        projection = part.partition(".")[2]
        key = (experts, projection)
        if key not in borrowed:
            borrowed[key] = _merged(experts, projection, statistics, name)
        statistics[name] = borrowed[key]
    if silent:
        report.silent_experts.extend(silent)
        numbers = sorted({int(name.rpartition(".experts.")[2].partition(".")[0]) for name in silent})
        tqdm.write(
            f"warning: {layer.prefix}: no calibration token reached expert{'s' if len(numbers) > 1 else ''} "
            f"{', '.join(map(str, numbers))}; the ranges of the layer's other experts are used instead. "
            "More or more varied calibration data avoids this",
            file=sys.stderr,
        )
    return {name: statistics[name] for name in names}


def _merged(experts: str, projection: str, statistics: Mapping[str, Statistics], asking: str) -> Statistics:
    others = [s for n, s in statistics.items() if n.startswith(f"{experts}.experts.") and n.endswith(f".{projection}")]
    if not others:
        raise CalibrationError(
            f"{asking}: no calibration token reached any of its layer's experts; use more calibration data"
        )
    merged = others[0].copy()
    for other in others[1:]:
        merged.merge(other)
    merged.count = 0
    return merged


def _head(
    skeleton: Skeleton,
    source: WeightSource,
    batches: Sequence[Batch],
    hidden: HiddenStates,
    visitor: Visitor,
    name: str,
) -> None:
    """Statistics of what enters the head, whose logits are not computed."""
    statistics: Statistics | None = None
    with skeleton.outer(source, head=True):
        layer = Layer(skeleton.num_layers, name, {name: skeleton.model.get_submodule("lm_head")})
        visitor.prepare(layer)
        for number, (batch, view) in enumerate(zip(batches, hidden.views, strict=True)):
            rows = skeleton.head_inputs(view).reshape(-1, skeleton.hidden_size)
            if batch.mask is not None:
                rows = rows[batch.mask.reshape(-1).bool()]
            seen = Statistics.of(rows, f"{name}, batch {number}")
            if statistics is None:
                statistics = seen
            else:
                statistics.merge(seen)
        assert statistics is not None
        visitor.finish(layer, {name: statistics})
