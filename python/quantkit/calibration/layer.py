"""What a sweep hands to whoever works on a model: a decoder layer, and what is said about the sweep itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from .hidden import HiddenStates
from .hooks import CacheRecorder
from .statistics import Statistics, Wants


@dataclass(frozen=True)
class Layer:
    """A decoder layer with its weights in memory. `linears` holds its Linears by their checkpoint names, `stored` every
    parameter and buffer by its name: (module, attribute). `outputs` runs the layer as it is on each batch,
    `probe` on a few tokens. Where
    experts come in groups, each group is a Layer and all else is one; `pools`: what all experts saw, by projection;
    `owners`: which rank alone works on a Linear, where several share out the experts. `release(name)`: the source's own
    of a parameter that has been replaced need not stay resident.
    """

    index: int
    prefix: str
    linears: Mapping[str, nn.Linear]
    stored: Mapping[str, tuple[nn.Module, str]]
    outputs: Callable[[], Iterator[Tensor]] | None = None
    probe: Callable[[], Tensor] | None = None
    pools: Mapping[str, Statistics] = field(default_factory=dict)
    owners: Mapping[str, int] = field(default_factory=dict)
    release: Callable[[str], None] = lambda _: None

    def tensor(self, name: str) -> Tensor:
        """The parameter or buffer with this checkpoint name."""
        module, key = self.stored[name]
        found: Tensor = getattr(module, key)
        return found.data

    def put(self, name: str, value: Tensor) -> None:
        """Replace a parameter by `value`."""
        module, key = self.stored[name]
        setattr(module, key, nn.Parameter(value, requires_grad=False))


class Visitor(Protocol):
    """What is done to each layer. `statistics`: which Linears' inputs are wanted to work with, `ranges`: which of them
    as they will be served; `caches`: attention modules whose keys and values are looked at as they will be; `queries`:
    those of them whose queries are, too.
    """

    @property
    def statistics(self) -> Mapping[str, Wants]: ...
    @property
    def ranges(self) -> Mapping[str, Wants]: ...
    @property
    def caches(self) -> Collection[str]: ...
    @property
    def queries(self) -> Collection[str]: ...
    @property
    def pools_below(self) -> int:
        """An expert that saw fewer tokens is worked on with what all of its layer's experts saw."""
        ...

    @property
    def together(self) -> bool:
        """Whether a layer with experts is worked on as a whole: all of them have to be there at once."""
        ...

    def across(self, index: int) -> str | None:
        """Why the inputs of layer `index` have to be worked on together; None if one at a time will do."""
        ...

    def norms(self, index: int) -> Mapping[str, Collection[str]]:
        """Norms of the layer that `finish` divides together with an input, each with that input's readers."""
        ...

    def prepare(self, layer: Layer) -> None:
        """Before any forward. May put other weights into the layer."""
        ...

    def finish(self, layer: Layer, statistics: Mapping[str, Statistics]) -> None:
        """With the statistics of the inputs of some Linears, all that read them among these: of one input after the
        other, or of all the layer's at once. Linears that read the same tensor have the very same object. May put other
        weights into the layer, and divide an input (`Statistics.divide`) whose norm it divides.
        """
        ...

    def observe(self, layer: Layer, ranges: Mapping[str, Statistics], caches: Mapping[str, CacheRecorder]) -> None:
        """After the last forward."""
        ...


class Onlooker:
    """A `Visitor` that leaves the weights as they are, but for what it does with what it is shown."""

    pools_below, together = 0, False

    def across(self, index: int) -> str | None:
        """Nothing is."""
        return None

    def norms(self, index: int) -> Mapping[str, Collection[str]]:
        """None."""
        return {}

    def prepare(self, layer: Layer) -> None:
        """Weights stay as they are."""


class Keeper(Protocol):
    """Lets a sweep go on in a later process. `begin`: the layer it starts with; those before it are done."""

    @property
    def begin(self) -> int: ...

    def restore(self, hidden: HiddenStates | None, report: SweepReport) -> None:
        """Put what enters layer `begin` into `hidden` (None if no layer is left), and what the layers before it told
        into `report`.
        """
        ...

    def layer_done(self, index: int, hidden: HiddenStates | None, report: SweepReport) -> None:
        """The visitor is done with layer `index`, and `hidden` is what enters the next one (None behind the last)."""
        ...


@dataclass
class SweepReport:
    """What a sweep saw: tokens, tokens per Linear of an expert, and those whose input was borrowed since none came;
    how many layers one forward served, and why each other one took two.
    """

    tokens: int
    expert_tokens: dict[str, int] = field(default_factory=dict)
    silent_experts: list[str] = field(default_factory=list)
    once: int = 0
    twice: dict[str, str] = field(default_factory=dict)
