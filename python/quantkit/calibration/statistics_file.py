"""Statistics on disk: a folder of safetensors files, one for each layer or part of one, and `statistics.json`.

For each distinct input, under the name of the first Linear that reads it: `min`, `max` fp32 [channels], `extremes` fp32
[batches, 2]; `absum` fp32 [channels] and `gram`, its lower triangle (`symmetric.pack`); `histogram` int64 [bins] and
`span` fp32 [1]. For each attention module `key` and `value` fp32 [heads], the largest magnitudes that it caches, and
`query` fp32 [heads] of what it is asked for. An expert that no token reached has none; it is in the list of the silent.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..checkpoint.layout import OutputTensor
from ..config.run_config import GATHERED
from .fingerprint import Data, Fingerprint
from .statistics import HISTOGRAM_BINS, Wants
from .symmetric import packed_shape

if TYPE_CHECKING:
    pass

MAIN, STEM = "statistics.json", "statistics"
FORMAT, VERSION = "quantkit statistics", 1
KINDS = GATHERED


@dataclass(frozen=True)
class Input:
    """One distinct input: the Linears that read it, its width, how many tokens came, in how many batches."""

    readers: tuple[str, ...]
    channels: int
    count: int
    batches: int

    @property
    def name(self) -> str:
        """What its tensors are called after."""
        return self.readers[0]

    def tensors(self, kinds: tuple[str, ...]) -> list[OutputTensor]:
        """What a file with these kinds holds of it."""
        wide = (self.channels,)
        found = [("min", "F32", wide), ("max", "F32", wide), ("extremes", "F32", (self.batches, 2))]
        if "gram" in kinds:
            found += [("absum", "F32", wide), ("gram", "F32", packed_shape(self.channels))]
        if "histogram" in kinds:
            found += [("histogram", "I64", (HISTOGRAM_BINS,)), ("span", "F32", (1,))]
        return [OutputTensor(f"{self.name}.{part}", dtype, shape) for part, dtype, shape in found]


def cache_tensors(attention: str, heads: int) -> list[OutputTensor]:
    """What a file holds of an attention module's cache."""
    return [OutputTensor(f"{attention}.{part}", "F32", (heads,)) for part in ("key", "value")]


def query_tensor(attention: str, heads: int) -> OutputTensor:
    """What a file holds of an attention module's queries."""
    return OutputTensor(f"{attention}.query", "F32", (heads,))


def wants(kinds: tuple[str, ...]) -> Wants:
    """What to gather of every input for a file with these kinds."""
    return Wants(gram="gram" in kinds, histogram="histogram" in kinds, averages=True)


@dataclass
class Contents:
    """What stands in `statistics.json`: where the statistics are from, and of what they are."""

    fingerprint: Fingerprint
    kinds: tuple[str, ...]
    data: list[Data] = field(default_factory=list)
    inputs: dict[str, Input] = field(default_factory=dict)
    caches: dict[str, int] = field(default_factory=dict)
    queries: dict[str, int] = field(default_factory=dict)
    silent: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Of all data."""
        return sum(data.tokens for data in self.data)

    @property
    def rows(self) -> int:
        """Of all data."""
        return sum(len(data.rows) for data in self.data)

    def tensors(self) -> Iterator[OutputTensor]:
        """Everything that the weight files hold."""
        for entry in self.inputs.values():
            yield from entry.tensors(self.kinds)
        for attention, heads in self.caches.items():
            yield from cache_tensors(attention, heads)
        for attention, heads in self.queries.items():
            yield query_tensor(attention, heads)

    def record(self) -> dict[str, Any]:
        """Where the statistics are from, for an output made with them."""
        return {**asdict(self.fingerprint), "rows": self.rows, "tokens": self.tokens}

    def to_json(self) -> str:
        """The text of the file."""
        inputs = {name: {k: v for k, v in asdict(entry).items()} for name, entry in self.inputs.items()}
        value = {
            "format": FORMAT,
            "version": VERSION,
            "quantkit": __version__,
            "fingerprint": asdict(self.fingerprint),
            "kinds": self.kinds,
            "data": [asdict(data) for data in self.data],
            "inputs": inputs,
            "caches": self.caches,
            "queries": self.queries,
            "silent": self.silent,
        }
        return json.dumps(value, indent=1) + "\n"
