"""Writes a checkpoint of a fixed layout: tensors in any order, from any thread, seen only when it is complete.

Everything goes to `<output>.partial`. `finish` flushes the weights, then the index and the side files, config.json
last, and renames the folder: whoever sees the output sees all of it, also after a power failure. `commit` tells when
tensors are on disk for good, for a journal that lets a later process go on.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import CheckpointError, nearest
from .background import BackgroundJobs
from .dtypes import name_of, torch_dtype, torch_shape
from .folder import CONFIG, HIDDEN_STATES, is_plain_name
from .journal import START_OVER
from .layout import Layout
from .native import host
from .reader import Checkpoint, TensorInfo
from .staging import JOURNAL, MARKER, JoinedFolder, Resume, StagingFolder

if TYPE_CHECKING:
    from typing import Self

    import torch

    from .._host import OutputFile

# Written, and given to the disk, in pieces of this size, so that the disk works while the next one is copied.
_PIECE = 64 << 20


def free_bytes(folder: Path) -> int:
    """Bytes that may still be written where `folder` is or will be."""
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    status = os.statvfs(existing)
    return status.f_bavail * status.f_frsize


def check_free_space(folder: Path, needed: int) -> None:
    """CheckpointError unless `needed` bytes fit where `folder` is or will be."""
    free = free_bytes(folder)
    if free < needed:
        raise CheckpointError(
            f"{folder}: the output needs {needed / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free; make room, "
            "or choose a save_path on another disk"
        )


class CheckpointWriter:
    """Writes the tensors of `layout` and side files to `output`, an absent or empty folder, or, with `overwrite`, an
    earlier output, which is replaced when the new one is complete.

    Use it as a context manager: leaving the block without `finish`, by an error or not, removes what was written,
    unless `resumable` was set; then it stays for a later process. That one gives `resume`, which is asked what is done
    in a folder with a journal (see `staging.Resume`): these tensors count as written, all else is written again.

    Tensors are written by a thread of its own that holds at most `max_pending_bytes` of them, or one larger one;
    its errors are raised by the next call. All methods may be called from several threads.
    """

    def __init__(
        self,
        layout: Layout,
        output: Path | str,
        overwrite: bool = False,
        max_pending_bytes: int = 64 << 20,
        *,
        resume: Resume | None = None,
    ) -> None:
        self._prepare(layout, output)
        self._open(StagingFolder(self.output, overwrite, resume), max_pending_bytes)

    @classmethod
    def join(cls, layout: Layout, output: Path | str, max_pending_bytes: int = 64 << 20) -> CheckpointWriter:
        """A writer of some of the tensors that another process's writer of the same layout has made the files for: it
        writes, and tells by `flush` or `commit` what is on disk; that other one finishes. Leaving its block removes
        nothing. It has to be made while that other one is open, and after it was.
        """
        joined = cls.__new__(cls)
        joined._prepare(layout, output)
        joined._open(JoinedFolder(joined.output), max_pending_bytes)
        return joined

    def _prepare(self, layout: Layout, output: Path | str) -> None:
        self.layout = layout
        self.output = Path(os.path.abspath(output))
        self.resumable = False
        self._claimed: set[str] = set()
        self._unfinished: set[str] = set()  # of these, what callers are writing themselves
        self._given: dict[str, None] = {}  # to the thread, and not committed yet
        self._apart: set[Path] = set()  # source folders known to be neither the output nor within it
        self._side_files: dict[str, Path] = {}
        self._config: bytes | None = None
        self._lock = threading.Lock()
        self._state = "open"
        self._files: dict[str, OutputFile] = {}

    def _open(self, staging: StagingFolder, max_pending_bytes: int) -> None:
        """Make the weight files in the folder, or open those of an earlier process."""
        self._staging = staging
        again = staging.done is not None
        if staging.done is not None:
            self._claimed.update(staging.done)
            self.resumable = True
        if not staging.published:
            try:
                self._open_files(again)
            except OSError as error:
                self._close_files()
                if again:
                    staging.leave()
                    raise CheckpointError(
                        f"{error.filename or staging.path}: {error.strerror}; what an earlier run wrote is not as it "
                        f"left it: {START_OVER}"
                    ) from error
                staging.discard()
                self._fail(error)
            except BaseException:
                self._close_files()
                staging.leave() if again else staging.discard()
                raise
        self._jobs = BackgroundJobs("quantkit-writer", max_pending_bytes)

    def _open_files(self, again: bool) -> None:
        native = host()
        if not again:
            check_free_space(self._staging.path, self.layout.file_bytes)
        elif not isinstance(self._staging, JoinedFolder):
            self._remove_strays()
        for shard in self.layout.shards:
            where = self._staging.path / shard.file
            file = native.OutputFile(where, shard.size, True) if again else native.OutputFile(where, shard.size)
            self._files[shard.file] = file
            file.write(shard.header, 0)

    def _remove_strays(self) -> None:
        """Side files are all written again; whatever else lies there is none of this layout's."""
        kept = {MARKER, JOURNAL, *HIDDEN_STATES, *(shard.file for shard in self.layout.shards)}
        for entry in os.scandir(self._staging.path):
            if entry.name in kept and entry.is_file(follow_symlinks=False):
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)

    def _fail(self, error: OSError) -> NoReturn:
        where = error.filename or self._staging.path
        raise CheckpointError(
            f"{where}: {error.strerror}; {free_bytes(self._staging.path) / 1e9:.2f} GB are free on that disk"
        ) from error

    @property
    def published(self) -> bool:
        """Whether the output is in place: by `finish`, or by an earlier process that had only `seal` left to do."""
        return self._staging.published

    @property
    def working_folder(self) -> Path:
        """Where the output is made; what else is put there has to be gone before `finish`."""
        return self._staging.path

    def missing(self) -> list[str]:
        """The tensors not given yet, in the layout's order."""
        with self._lock:
            return [name for name in self.layout.tensors if name not in self._claimed or name in self._unfinished]

    def written_elsewhere(self, names: Iterable[str]) -> None:
        """Other processes have written these tensors (see `join`), and they are on disk."""
        for name in names:
            self._claim(name)
            with self._lock:
                self._given[name] = None

    def _claim(self, name: str) -> None:
        """Check that tensor `name` is planned and has not been given yet, and note that it has."""
        with self._lock:
            self._require_open()
            if name not in self.layout.tensors:
                hint = nearest(name, self.layout.tensors)
                raise CheckpointError(f"{self.output}: tensor '{name}' is not part of the planned output{hint}")
            if name in self._claimed:
                raise CheckpointError(f"{self.output}: tensor '{name}' is written twice")
            self._claimed.add(name)

    def _require_open(self) -> None:
        if self._state != "open":
            raise CheckpointError(f"{self.output}: the writer is {self._state}; make a new one")

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor of exactly the planned dtype and shape, on any device, of any strides.

        Returns before it is on disk, so the tensor must not be changed afterwards. For a tensor of the source `copy`
        is better: here its pages would become resident again after `Checkpoint.release`.
        """
        import torch

        planned = self.layout.tensors.get(name)
        if planned is not None:
            if tensor.dtype != torch_dtype(planned.dtype):
                raise CheckpointError(
                    f"{self.output}: tensor '{name}' is planned as {planned.dtype}, not {name_of(tensor.dtype)}"
                )
            if tuple(tensor.shape) != torch_shape(planned.dtype, planned.shape):
                raise CheckpointError(
                    f"{self.output}: tensor '{name}' is planned with shape {list(planned.shape)}, "
                    f"not {list(tensor.shape)}"
                )
            if tensor.layout != torch.strided or tensor.device.type == "meta":
                raise CheckpointError(f"{self.output}: tensor '{name}' is {tensor.layout} on {tensor.device}: no data")
        self._claim(name)
        plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        # numpy() because torch tensors have no buffer protocol; uint8 because numpy has no bfloat16.
        data = plain.reshape(-1).view(torch.uint8).numpy()
        shard = self.layout.shard_of[name]
        begin, _ = shard.ranges[name]
        file = self._files[shard.file]

        def job() -> None:
            for offset in range(0, len(data), _PIECE):
                piece = data[offset : offset + _PIECE]
                file.write(piece, begin + offset)
                file.start_writeback(begin + offset, begin + offset + len(piece))

        self._submit(len(data), job, name)

    @contextmanager
    def in_place(self, names: Sequence[str]) -> Iterator[dict[str, tuple[OutputFile, int]]]:
        """Within the block the caller writes all of these tensors, each where it begins in its file, from any thread;
        at the end of the block they count as written.
        """
        for name in names:
            self._claim(name)
        with self._lock:
            self._unfinished.update(names)
        shards = {name: self.layout.shard_of[name] for name in names}
        try:
            yield {name: (self._files[shard.file], shard.ranges[name][0]) for name, shard in shards.items()}
        except OSError as error:
            if error.filename in {str(self._staging.path / shard.file) for shard in shards.values()}:
                self._fail(error)
            raise
        with self._lock:
            self._unfinished.difference_update(names)
            self._given.update(dict.fromkeys(names))

    def copy(self, name: str, info: TensorInfo, source: Checkpoint) -> None:
        """Write the bytes of `source`'s tensor `info` under `name`; they are copied in the kernel and never enter
        this process, unless `source` makes it as it is read."""
        self._require_apart(source.folder)
        if info.name in source.remade:
            self.write(name, source.tensor(info.name))
            source.release(info.name)
            return
        planned = self.layout.tensors.get(name)
        if planned is not None and (planned.dtype, tuple(planned.shape)) != (info.dtype, info.shape):
            raise CheckpointError(
                f"{self.output}: tensor '{name}' is planned as {planned.dtype} {list(planned.shape)}, "
                f"not {info.dtype} {list(info.shape)}"
            )
        mapped = source.mapped(info.file)
        self._claim(name)
        shard = self.layout.shard_of[name]
        begin, _ = shard.ranges[name]
        file = self._files[shard.file]

        def job() -> None:
            for offset in range(0, info.nbytes, _PIECE):
                length = min(_PIECE, info.nbytes - offset)
                file.copy_from(mapped, info.begin + offset, begin + offset, length)
                file.start_writeback(begin + offset, begin + offset + length)

        self._submit(0, job, name)

    def _submit(self, nbytes: int, job: Any, name: str | None = None) -> None:
        try:
            self._jobs.submit(nbytes, job)
        except OSError as error:
            self._fail(error)
        if name is not None:
            with self._lock:
                self._given[name] = None

    def commit(self, then: Callable[[list[str]], None], names: Iterable[str] | None = None) -> None:
        """Returns at once; when the tensors `names`, or all that were given since they were last named, are on disk for
        good, the writer's thread calls `then` with their names. What that raises is raised by the next call here.
        """
        with self._lock:
            self._require_open()
            chosen = list(self._given if names is None else names)
            lacking = [name for name in chosen if name not in self._given]
            if lacking:
                raise CheckpointError(f"{self.output}: tensor '{lacking[0]}' was not given, or is committed already")
            for name in chosen:
                del self._given[name]
        files = {shard.file: self._files[shard.file] for shard in (self.layout.shard_of[name] for name in chosen)}

        def job() -> None:
            for file in files.values():
                file.sync()
            then(chosen)

        self._submit(0, job)

    def drain(self) -> None:
        """Wait until all that was given is written, and every `commit` done."""
        try:
            self._jobs.drain()
        except OSError as error:
            self._fail(error)

    def flush(self) -> list[str]:
        """Bring all that was given to disk for good; the names of what had not been committed."""
        found: list[str] = []
        self.commit(found.extend)
        self.drain()
        return found

    def side_file(self, name: str, content: bytes) -> None:
        """Add a file beside the weights. config.json is held back and written last: it makes the folder a model."""
        if not is_plain_name(name) or name.startswith(".") or name in self._files or name == self.layout.index_name:
            raise CheckpointError(f"{self.output}: side file '{name}' would not be a file of its own in the folder")
        with self._lock:
            self._require_open()
            if name in self._side_files or (name == CONFIG and self._config is not None):
                raise CheckpointError(f"{self.output}: side file '{name}' is written twice")
            if name == CONFIG:
                self._config = content
                return
            self._side_files[name] = self._staging.path / name
        self._put(name, content)

    def copy_side_file(self, path: Path) -> None:
        """Carry over a file of the source folder under its own name."""
        self._require_apart(path.parent)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        self.side_file(path.name, content)

    def _put(self, name: str, content: bytes) -> None:
        try:
            with open(self._staging.path / name, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            self._fail(error)

    def _require_apart(self, source: Path) -> None:
        """Refuse to replace the folder that is being read, or one that holds it."""
        if source in self._apart:
            return
        real, output = (Path(os.path.realpath(source)), Path(os.path.realpath(self.output)))
        if output == real or output in real.parents:
            raise CheckpointError(f"{self.output}: is or holds the source model {source}; choose another save_path")
        self._apart.add(source)

    def finish(self, seal: bool = True) -> Path:
        """Complete the output and put it in place; CheckpointError, with everything removed unless it is resumable, if
        a tensor is missing. Without `seal` the folder still counts as a run's own that can be resumed; see `seal`.
        """
        try:
            self._require_open()
            missing = self.missing()
            if missing:
                more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
                raise CheckpointError(f"{self.output}: never written: {', '.join(missing[:10])}{more}")
            if self._config is None:
                raise CheckpointError(f"{self.output}: no {CONFIG} was given, without which the folder is no model")
            self._jobs.drain()
            for file in self._files.values():
                file.sync()
                file.close()
            index = self.layout.index_bytes
            if index is not None:
                self._put(self.layout.index_name, index)
            self._put(CONFIG, self._config)
            self._jobs.stop()
            self._state = "finished"
            self._staging.publish()
        except OSError as error:
            self.abort()
            self._fail(error)
        except BaseException:
            self.abort()
            raise
        if seal:
            self.seal()
        return self.output

    def seal(self) -> None:
        """Take the journal and the mark out of the finished output; nothing can be resumed after."""
        try:
            self._staging.seal()
        except OSError as error:
            self._fail(error)

    def abort(self) -> None:
        """Stop and remove everything written, or leave it if `resumable`; nothing to do after `finish`."""
        if self._state == "finished" or self._staging.published:
            self._jobs.stop()
            self._staging.leave()
            return
        if self._state != "open":
            return
        self._state = "aborted"
        self._jobs.stop()
        self._close_files()
        if self.resumable:
            self._staging.leave()
        else:
            self._staging.discard()

    def _close_files(self) -> None:
        # Dropped, not closed: an error of close() says nothing about files that are about to be removed.
        self._files.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.abort()
