"""Writes what `statistics_file` describes, and lets a later process go on."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from ..checkpoint.background import BackgroundJobs
from ..checkpoint.folder import HIDDEN_STATES
from ..checkpoint.journal import START_OVER
from ..checkpoint.layout import Layout, OutputTensor, plan_layout
from ..checkpoint.native import host
from ..checkpoint.staging import JOURNAL, MARKER, Resume, StagingFolder
from ..checkpoint.writer import check_free_space, free_bytes
from ..errors import CheckpointError
from .statistics import Statistics
from .statistics_file import MAIN, STEM, Contents, Input, cache_tensors, query_tensor
from .symmetric import pack

if TYPE_CHECKING:
    from typing import Self

_PENDING, _PIECE = 256 << 20, 64 << 20


@dataclass
class Written:
    """What a folder holds so far, for its journal: as in `Contents`, and each tensor's file."""

    inputs: dict[str, Input]
    caches: dict[str, int]
    queries: dict[str, int]
    silent: list[str]
    files: dict[str, str]


class StatisticsWriter:
    """Writes statistics as they come, at most a few hundred MB behind, and puts the folder in place when all are there.

    A context manager: leaving the block without `finish` removes what was written, unless `resumable` was set. With
    `resume` (see `staging.Resume`) files that an earlier process has done stay; once `written` says again what is in
    them, `check_written`.
    """

    def __init__(
        self,
        output: Path | str,
        contents: Contents,
        *,
        overwrite: bool = False,
        expected: int = 0,
        resume: Resume | None = None,
    ) -> None:
        self.output, self.contents = Path(os.path.abspath(output)), contents
        self._staging = StagingFolder(self.output, overwrite, resume, main=MAIN)
        self.written = Written(contents.inputs, contents.caches, contents.queries, contents.silent, {})
        done = self._staging.done
        self.resumable = done is not None
        self._news: list[str] = []
        self._parts = len(done or ())
        self._open = True
        try:
            if not self.published:
                there = self._kept(done or ())
                check_free_space(self._staging.path, expected - there)
        except BaseException:
            self._staging.leave() if self.resumable else self._staging.discard()
            raise
        self._jobs = BackgroundJobs("quantkit-statistics", _PENDING)

    def _kept(self, done: Collection[str]) -> int:
        """The size of the files in `done`; all else that an earlier process left is removed."""
        total, names = 0, {MARKER, JOURNAL, *HIDDEN_STATES, *done}
        for entry in os.scandir(self._staging.path):
            if entry.name not in names or not entry.is_file(follow_symlinks=False):
                shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)
            elif entry.name in done:
                total += entry.stat().st_size
        return total

    def check_written(self) -> None:
        """CheckpointError unless the files are there that `written` names, of the sizes that they have to have."""
        held: dict[str, list[OutputTensor]] = {}
        for tensor in self.contents.tensors():
            file = self.written.files.get(tensor.name)
            if file is None:
                raise CheckpointError(f"{self._staging.path}: no file is known for '{tensor.name}'; {START_OVER}")
            held.setdefault(file, []).append(tensor)
        done = set(self._staging.done or ())
        for name in sorted(held.keys() | done):
            path, tensors = self._staging.path / name, held.get(name)
            right = tensors is not None and name in done and path.is_file() and not path.is_symlink()
            if tensors is None or not right or path.stat().st_size != _layout(tensors, name).shards[0].size:
                raise CheckpointError(f"{path}: is not as an earlier calibration left it; {START_OVER}")

    @property
    def working_folder(self) -> Path:
        """Where files of this calibration that are no statistics may lie until `finish`."""
        return self._staging.path

    @property
    def published(self) -> bool:
        """Whether the folder is in place, and but for `seal` all is done."""
        return self._staging.published

    def add(
        self,
        statistics: Mapping[str, Statistics],
        caches: Mapping[str, Mapping[str, Tensor]],
        silent: Sequence[str] = (),
    ) -> None:
        """One more file: statistics by the names of Linears, those that share an input having the same object; what
        there is of the `key`, `value` and `query` of attention modules. `silent`: experts that no token reached.
        """
        self.contents.silent += silent
        groups: dict[int, tuple[Statistics, list[str]]] = {}
        for name, seen in statistics.items():
            groups.setdefault(id(seen), (seen, []))[1].append(name)
        sources: dict[str, Callable[[], Tensor]] = {}
        planned: list[OutputTensor] = []
        for seen, readers in groups.values():
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
        (shard,) = _layout(planned, f"{STEM}-{self._parts:05d}.safetensors").shards
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
        self._news.append(shard.file)
        self.written.files.update(dict.fromkeys((tensor.name for tensor in planned), shard.file))

    def commit(self, then: Callable[[list[str]], None]) -> None:
        """Returns at once; when all that was added is on disk for good, the writer's thread calls `then` with the names
        of the files that are new since the last time. What that raises is raised by the next call here.
        """
        news, self._news = self._news, []

        def job() -> None:
            host().fsync_directory(self._staging.path)
            then(news)

        try:
            self._jobs.submit(0, job)
        except OSError as error:
            self._fail(error)

    def drain(self) -> None:
        """Wait until all that was added is written, and every `commit` done."""
        try:
            self._jobs.drain()
        except OSError as error:
            self._fail(error)

    def flush(self) -> list[str]:
        """Nothing: other processes write no statistics, see `resume_ranks.Joined`."""
        return []

    def written_elsewhere(self, names: Iterable[str]) -> None:
        """Nothing, likewise."""
        assert not list(names)

    def finish(self) -> Path:
        """Everything is there: put the folder in place."""
        try:
            self._jobs.drain()
            size = sum(tensor.nbytes for tensor in self.contents.tensors())
            index = {"metadata": {"total_size": size}, "weight_map": self.written.files}
            self._put(f"{STEM}.safetensors.index.json", json.dumps(index, indent=1) + "\n")
            self._put(MAIN, self.contents.to_json())
            self._jobs.stop()
            self._open = False
            self._staging.publish()
            self.seal()
        except OSError as error:
            self.abort()
            self._fail(error)
        return self.output

    def seal(self) -> Path:
        """Take the journal and the mark out of the finished folder; nothing can be resumed after."""
        self._staging.seal()
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
        """Stop and remove everything written, or leave it if `resumable`; nothing to do after `finish`."""
        if self._open:
            self._open = False
            self._jobs.stop()
            self._staging.leave() if self.resumable or self.published else self._staging.discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.abort()


@dataclass(frozen=True)
class JoinedFolder:
    """What another process than the one that writes has of the folder: see `resume_ranks.Joined`."""

    working_folder: Path

    def drain(self) -> None:
        """Nothing waits."""

    def flush(self) -> list[str]:
        """Nothing was given."""
        return []

    def written_elsewhere(self, names: Iterable[str]) -> None:
        """Of no concern here."""


def _layout(planned: list[OutputTensor], file: str) -> Layout:
    """Of one file."""
    size = sum(tensor.nbytes for tensor in planned)
    return plan_layout(planned, max(1, size), {}, stem=file.removesuffix(".safetensors"))


def is_part(name: str) -> bool:
    """Whether `name` can be that of a file of statistics."""
    return re.fullmatch(rf"{STEM}-\d{{5,}}\.safetensors", name) is not None


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
