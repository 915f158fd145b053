"""Statistics on disk: a folder of safetensors files, one for each layer or part of one, and `statistics.json`.

For each distinct input, under the name of the first Linear that reads it: `min`, `max` fp32 [channels], `extremes` fp32
[batches, 2]; `absum` fp32 [channels] and `gram`, its lower triangle (`symmetric.pack`); `histogram` int64 [bins] and
`span` fp32 [1]. For each attention module `key` and `value` fp32 [heads], the largest magnitudes that it caches, and
`query` fp32 [heads] of what it is asked for. An expert that no token reached has none; it is in the list of the silent.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from .. import __version__
from ..checkpoint.background import BackgroundJobs
from ..checkpoint.layout import OutputTensor, plan_layout
from ..checkpoint.native import host
from ..checkpoint.staging import StagingFolder
from ..checkpoint.writer import check_free_space, free_bytes
from ..config.run_config import GATHERED
from ..errors import CheckpointError
from .fingerprint import Data, Fingerprint
from .statistics import HISTOGRAM_BINS, Statistics, Wants
from .symmetric import pack, packed_shape

if TYPE_CHECKING:
    from typing import Self

MAIN, STEM = "statistics.json", "statistics"
FORMAT, VERSION = "quantkit statistics", 1
KINDS = GATHERED
_PENDING, _PIECE = 256 << 20, 64 << 20


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


class StatisticsWriter:
    """Writes statistics as they come, at most a few hundred MB behind, and puts the folder in place when all are there.

    A context manager: leaving the block without `finish` removes what was written.
    """

    def __init__(self, output: Path | str, contents: Contents, *, overwrite: bool = False, expected: int = 0) -> None:
        self.output, self.contents = Path(os.path.abspath(output)), contents
        self._staging = StagingFolder(self.output, overwrite, main=MAIN)
        self._files: dict[str, str] = {}
        self._bytes = self._parts = 0
        self._open = True
        try:
            check_free_space(self._staging.path, expected)
        except BaseException:
            self._staging.discard()
            raise
        self._jobs = BackgroundJobs("quantkit-statistics", _PENDING)

    @property
    def working_folder(self) -> Path:
        """Where files of this calibration that are no statistics may lie until `finish`."""
        return self._staging.path

    def add(self, statistics: Mapping[str, Statistics], caches: Mapping[str, Mapping[str, Tensor]]) -> None:
        """One more file: statistics by the names of Linears, those that share an input having the same object; what
        there is of the `key`, `value` and `query` of attention modules. Experts with a count of 0 borrowed theirs, and
        are silent.
        """
        groups: dict[int, tuple[Statistics, list[str]]] = {}
        for name, seen in statistics.items():
            groups.setdefault(id(seen), (seen, []))[1].append(name)
        sources: dict[str, Callable[[], Tensor]] = {}
        planned: list[OutputTensor] = []
        for seen, readers in groups.values():
            if not seen.count:
                self.contents.silent += readers
                continue
            entry = Input(tuple(readers), len(seen.min), seen.count, _batches(seen))
            self.contents.inputs[entry.name] = entry
            planned += entry.tensors(self.contents.kinds)
            sources.update(_sources(entry.name, seen))
        for attention, kept in caches.items():
            if "kv_cache" in self.contents.kinds and "key" in kept and "value" in kept:
                self.contents.caches[attention] = len(kept["key"])
                planned += cache_tensors(attention, len(kept["key"]))
            if "queries" in self.contents.kinds and "query" in kept:
                self.contents.queries[attention] = len(kept["query"])
                planned.append(query_tensor(attention, len(kept["query"])))
            sources |= {f"{attention}.{part}": largest.clone for part, largest in kept.items()}
        if planned:
            self._write(planned, sources)

    def _write(self, planned: list[OutputTensor], sources: Mapping[str, Callable[[], Tensor]]) -> None:
        self._parts += 1
        size = sum(tensor.nbytes for tensor in planned)
        layout = plan_layout(planned, max(1, size), {}, stem=f"{STEM}-{self._parts:05d}")
        (shard,) = layout.shards
        try:
            file = host().OutputFile(self._staging.path / shard.file, shard.size)
            file.write(shard.header, 0)
            for tensor in shard.tensors:
                data = sources[tensor.name]().contiguous().reshape(-1).view(torch.uint8).numpy()
                begin, _ = shard.ranges[tensor.name]
                self._jobs.submit(len(data), _writing(file, data, begin))

            def done() -> None:
                file.sync()
                file.close()

            self._jobs.submit(0, done)
        except OSError as error:
            self._fail(error)
        self._bytes += size
        self._files.update(dict.fromkeys((tensor.name for tensor in planned), shard.file))

    def finish(self) -> Path:
        """Everything is there: put the folder in place."""
        try:
            self._jobs.drain()
            index = {"metadata": {"total_size": self._bytes}, "weight_map": self._files}
            self._put(f"{STEM}.safetensors.index.json", json.dumps(index, indent=1) + "\n")
            self._put(MAIN, self.contents.to_json())
            self._jobs.stop()
            self._open = False
            self._staging.publish()
            self._staging.seal()
        except OSError as error:
            self.abort()
            self._fail(error)
        return self.output

    def _put(self, name: str, text: str) -> None:
        with open(self._staging.path / name, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def _fail(self, error: OSError) -> NoReturn:
        where = error.filename or self._staging.path
        free = free_bytes(self._staging.path.parent) / 1e9
        raise CheckpointError(f"{where}: {error.strerror}; {free:.2f} GB are free on that disk") from error

    def abort(self) -> None:
        """Stop and remove everything written; nothing to do after `finish`."""
        if self._open:
            self._open = False
            self._jobs.stop()
            self._staging.discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.abort()


def _batches(seen: Statistics) -> int:
    assert seen.extremes is not None
    return len(seen.extremes)


def _sources(name: str, seen: Statistics) -> dict[str, Callable[[], Tensor]]:
    """Each tensor of an input as a copy, made when it is its turn: a packed Gram matrix takes half its room again."""
    assert seen.extremes is not None
    found: dict[str, Callable[[], Tensor]] = {
        "min": seen.min.clone,
        "max": seen.max.clone,
        "extremes": seen.extremes.clone,
    }
    if seen.gram is not None and seen.absum is not None:
        gram = seen.gram
        found |= {"absum": seen.absum.clone, "gram": lambda: pack(gram)}
    if seen.histogram is not None:
        found |= {"histogram": seen.histogram.counts.clone, "span": seen.histogram.span.clone}
    return {f"{name}.{part}": source for part, source in found.items()}


def _writing(file: Any, data: Any, begin: int) -> Callable[[], None]:
    def job() -> None:
        for offset in range(0, len(data), _PIECE):
            piece = data[offset : offset + _PIECE]
            file.write(piece, begin + offset)
            file.start_writeback(begin + offset, begin + offset + len(piece))

    return job
