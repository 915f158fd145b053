"""A layer in one forward: every batch waits in front of each distinct input of the Linears that are worked on.

When all batches have arrived, that input's statistics are complete. The visitor works on its readers, and all batches
go on with the weights it left, so each input is made by Linears that are done, and the next layer's inputs come out at
the end. A batch that waits is a greenlet: its forward keeps a stack of its own, and one thread walks them in turn.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from ..distributed import Ranks
from ..errors import CalibrationError
from .hooks import BatchRows, CacheRecorder, Sharing
from .statistics import Statistics, Wants
from .tree import Leaves, Sums, total

if TYPE_CHECKING:
    from .layer import Layer, Visitor

# Tokens of the forward that finds out what a layer does.
PROBE_TOKENS = 8
HOW_TO_AVOID = "global.calibration_forwards: 2 does without"


class Unfit(Exception):
    """Why a layer cannot go in lockstep."""


@dataclass(frozen=True)
class Course:
    """What happens in a layer's forward: its distinct inputs in order, each with the Linears that read it in the order
    of their calls, and how many bytes for each position are alive at most while a batch waits.
    """

    inputs: tuple[tuple[str, ...], ...]
    bytes_per_position: float


def explore(
    layer: Layer,
    wanted: Collection[str],
    norms: Mapping[str, Collection[str]],
    run: Callable[[], object],
    positions: int,
    known: Iterable[Tensor],
) -> Course:
    """The course of `layer`, as `run`, a forward of a few `positions`, shows it for the Linears in `wanted`. `norms`:
    those whose output is to be divided, each with its readers. `known`: tensors that are there anyway.

    Unfit if a Linear is not called just once, not in the usual way, or does not read just what its norm gives.
    """
    sharing, readers, calls = Sharing(), dict[str, list[str]](), Counter[str]()
    usual, most = _modes(), 0
    there = {x.untyped_storage().data_ptr() for x in known}
    there |= {layer.tensor(name).untyped_storage().data_ptr() for name in layer.stored}

    def read(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            nonlocal most
            calls[name] += 1
            readers.setdefault(sharing.first(name, args[0]), []).append(name)
            most = max(most, _alive(sys._getframe(), there))
            if _modes() != usual:
                raise Unfit(f"{name} is called under autocast or with gradients")

        return hook

    def give(norm: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            sharing.first(norm, out)

        return hook

    with ExitStack() as stack:
        for name in wanted:
            stack.callback(layer.linears[name].register_forward_pre_hook(read(name)).remove)
        for norm in norms:
            module, _ = layer.stored[f"{norm}.weight"]
            stack.callback(module.register_forward_hook(give(norm)).remove)
        run()
    for name in wanted:
        if calls[name] != 1:
            raise Unfit(f"{name} is called {calls[name]} times in a forward")
    for norm, members in norms.items():
        for name in members:
            if name in wanted and name not in readers.get(norm, ()):
                raise Unfit(f"{name} does not read just what {norm} gives")
    return Course(tuple(map(tuple, readers.values())), most / positions)


def _modes() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")


def _alive(frame: FrameType | None, there: set[int]) -> int:
    """Bytes of the tensors that `frame` and its callers have in variables, but for those that are `there` anyway."""
    found: dict[int, int] = {}
    while frame is not None and frame.f_code is not explore.__code__:
        for value in frame.f_locals.values():
            for x in value if isinstance(value, tuple | list) else (value,):
                if isinstance(x, Tensor):
                    storage = x.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
        frame = frame.f_back
    return sum(size for place, size in found.items() if place not in there)


class _Walk:
    """One batch on its way through the layer."""

    def __init__(self, number: int, rows: BatchRows, forward: Callable[[], None]) -> None:
        self.number, self.rows, self.greenlet = number, rows, greenlet(forward)
        # Tensors are told apart as they are once the batch goes on with them.
        self.sharing = Sharing()


class Lockstep:
    """All batches of a layer: this rank's, those of `leaves`. `forward(i)` runs the layer on the i-th of these and puts
    away what it gives; `rest(i)` is called when that batch waits.
    """

    def __init__(
        self,
        layer: Layer,
        course: Course,
        batches: Sequence[BatchRows],
        forward: Callable[[int], None],
        leaves: Leaves,
        ranks: Ranks,
        cache: CacheRecorder | None = None,
        rest: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.layer, self.course, self.cache, self.rest = layer, course, cache, rest
        self._walks = [
            _Walk(number, batch, lambda i=i: forward(i))  # type: ignore[misc]
            for i, (number, batch) in enumerate(zip(leaves.numbers, batches, strict=True))
        ]
        self._leaves, self._ranks = leaves, ranks
        self._now: _Walk | None = None

    def run(
        self, visitor: Visitor, statistics: Mapping[str, Wants], ranges: Mapping[str, Wants], *, to_end: bool
    ) -> dict[str, Statistics]:
        """The pass. `visitor` is given the statistics of one input after the other; those of `ranges` (of each input as
        it goes on) are the result. Unless `to_end`, batches end behind the last input.
        """
        found: dict[str, Statistics] = {}
        with ExitStack() as stack:
            stack.callback(self._end)
            for readers in self.course.inputs:
                for name in readers:
                    hook = self._hook(name, readers[0])
                    stack.callback(self.layer.linears[name].register_forward_pre_hook(hook).remove)
            for readers in self.course.inputs:
                wants = _joint(statistics, readers)
                seen, held = self._arrive(readers[0], wants)
                if seen is not None:
                    visitor.finish(self.layer, {name: seen for name in readers if name in statistics})
                last = self._go_on(readers[0], _joint(ranges, readers), held, None if seen is None else seen.divided)
                if last is not None:
                    found.update({name: last for name in readers if name in ranges})
                del held, seen
            for number, walk in enumerate(self._walks if to_end else ()):
                self._step(walk, None)
                self.rest(number)
        return found

    def _hook(self, name: str, leader: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            walk = self._now
            assert walk is not None
            if name == leader:
                getcurrent().parent.switch((name, args[0]))
            if walk.sharing.first(name, args[0]) != leader:
                raise CalibrationError(f"{name}: does not always read what {leader} reads; {HOW_TO_AVOID}")

        return hook

    def _step(self, walk: _Walk, leader: str | None) -> Tensor:
        """Let a batch go on to its next input, that of `leader`, or to its end."""
        self._now = walk
        if self.cache is not None:
            mask = walk.rows.batch.mask
            self.cache.mask = None if mask is None else mask.bool()
        name, x = walk.greenlet.switch() or (None, torch.empty(0))
        if name != leader:
            raise CalibrationError(
                f"{self.layer.prefix}: with {walk.rows.samples(x)} its forward comes to {name or 'its end'} where "
                f"{leader or 'the end'} is due; {HOW_TO_AVOID}"
            )
        return x

    def _arrive(self, leader: str, wants: Wants | None) -> tuple[Statistics | None, list[Tensor]]:
        """Every batch to its next input; the statistics of that, if there are `wants`, and what waits there."""
        seen = None if wants is None else Sums(self._leaves, wants)
        held = []
        for number, walk in enumerate(self._walks):
            x = self._step(walk, leader)
            self.rest(number)
            if seen is not None:
                seen.update(walk.number, walk.rows.of(x, leader), self._where(walk, leader, x))
            held.append(x)
        return None if seen is None else total(seen.parts(), self._ranks), held

    def _go_on(
        self, leader: str, wants: Wants | None, held: Sequence[Tensor], divisor: Tensor | None
    ) -> Statistics | None:
        """What waits is divided as the norm in front has been by now; the statistics of it then."""
        seen = None if wants is None else Sums(self._leaves, wants)
        for walk, x in zip(self._walks, held, strict=True):
            if divisor is not None:
                x.div_(divisor)
            if seen is not None:
                seen.update(walk.number, walk.rows.of(x, leader), self._where(walk, leader, x))
        return None if seen is None else total(seen.parts(), self._ranks)

    def _where(self, walk: _Walk, leader: str, x: Tensor) -> Callable[[], str]:
        return lambda: f"{leader}, {walk.rows.samples(x)}"

    def _end(self) -> None:
        """Whoever has not come to the end goes no further."""
        for walk in self._walks:
            if not walk.greenlet.dead:
                walk.greenlet.throw()


def _joint(wants: Mapping[str, Wants], readers: Iterable[str]) -> Wants | None:
    """What is wanted of an input by any of its readers."""
    joint: Wants | None = None
    for name in readers:
        if name in wants:
            joint = wants[name] if joint is None else joint | wants[name]
    return joint
