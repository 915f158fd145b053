"""Writes a checkpoint of a fixed layout: tensors in any order, from any thread, seen only when it is complete.

Everything goes to `<output>.partial`. `finish` flushes the weights, then the index and the side files, config.json
last, and renames the folder: whoever sees the output sees all of it, also after a power failure.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import CheckpointError, nearest
from .background import BackgroundJobs
from .dtypes import name_of, torch_dtype, torch_shape
from .folder import CONFIG, is_plain_name
from .layout import Layout, OutputTensor
from .native import host
from .reader import Checkpoint, TensorInfo
from .staging import StagingFolder

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

    Use it as a context manager: leaving the block without `finish`, by an error or not, removes what was written.
    Tensors are written by a thread of its own that holds at most `max_pending_bytes` of them, or one larger one;
    its errors are raised by the next call. All methods may be called from several threads.
    """

    def __init__(
        self, layout: Layout, output: Path | str, overwrite: bool = False, max_pending_bytes: int = 64 << 20
    ) -> None:
        self._prepare(layout, output)
        native = host()
        self._staging = StagingFolder(self.output, overwrite)
        self._folder = self._staging.path
        try:
            check_free_space(self._staging.path, layout.file_bytes)
            for shard in layout.shards:
                file = native.OutputFile(self._staging.path / shard.file, shard.size)
                self._files[shard.file] = file
                file.write(shard.header, 0)
        except OSError as error:
            self._close_files()
            self._staging.discard()
            self._fail(error)
        except BaseException:
            self._staging.discard()
            raise
        self._jobs = BackgroundJobs("quantkit-writer", max_pending_bytes)

    def _prepare(self, layout: Layout, output: Path | str) -> None:
        self.layout = layout
        self.output = Path(os.path.abspath(output))
        self._claimed: set[str] = set()
        self._lacking: dict[str, int] = {}  # of those that came in parts, the bytes that are still to come
        self._apart: set[Path] = set()  # source folders known to be neither the output nor within it
        self._side_files: dict[str, Path] = {}
        self._config: bytes | None = None
        self._lock = threading.Lock()
        self._state = "open"
        self._files: dict[str, OutputFile] = {}

    def _fail(self, error: OSError) -> NoReturn:
        where = error.filename or self._folder
        raise CheckpointError(
            f"{where}: {error.strerror}; {free_bytes(self._folder) / 1e9:.2f} GB are free on that disk"
        ) from error

    @property
    def working_folder(self) -> Path:
        """Where the output is made; what else is put there has to be gone before `finish`."""
        return self._folder

    def missing(self) -> list[str]:
        """The tensors not given yet, in the layout's order."""
        with self._lock:
            return [name for name in self.layout.tensors if name not in self._claimed or name in self._lacking]

    def written_elsewhere(self, names: Iterable[str]) -> None:
        """Other processes have written these tensors (see `joined`), and they are on disk."""
        for name in names:
            self._claim(name)

    def _claim(self, name: str, in_parts: bool = False) -> OutputTensor:
        """Check that tensor `name` is planned and has not been given yet, or not all of it, and note that it has."""
        with self._lock:
            self._require_open()
            if in_parts and name in self._lacking:
                return self.layout.tensors[name]
            planned = self.layout.tensors.get(name)
            if planned is None:
                hint = nearest(name, self.layout.tensors)
                raise CheckpointError(f"{self.output}: tensor '{name}' is not part of the planned output{hint}")
            if name in self._claimed:
                raise CheckpointError(f"{self.output}: tensor '{name}' is written twice")
            self._claimed.add(name)
            if in_parts:
                self._lacking[name] = planned.nbytes
            return planned

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

        self._submit(len(data), job)

    def write_rows(self, name: str, first: int, rows: torch.Tensor) -> None:
        """Write rows [first, first + len(rows)) of tensor `name`, in the calling thread; when it has all of them, the
        tensor is written. Parts may come in any order and from several threads, each row once.
        """
        import torch

        planned = self._claim(name, in_parts=True)
        count, *rest = torch_shape(planned.dtype, planned.shape)
        if (rows.dtype, list(rows.shape[1:])) != (torch_dtype(planned.dtype), rest) or first + len(rows) > count:
            raise CheckpointError(
                f"{self.output}: tensor '{name}' is planned as {planned.dtype} {list(planned.shape)}, and its rows "
                f"from {first} on are {name_of(rows.dtype)} {list(rows.shape)}"
            )
        data = rows.contiguous().reshape(-1).view(torch.uint8).numpy()
        shard = self.layout.shard_of[name]
        begin, end = shard.ranges[name]
        begin += first * ((end - begin) // max(1, count))
        file = self._files[shard.file]
        try:
            file.write(data, begin)
            file.start_writeback(begin, begin + len(data))
        except OSError as error:
            self._fail(error)
        with self._lock:
            self._lacking[name] -= len(data)
            if not self._lacking[name]:
                del self._lacking[name]

    def copy(self, name: str, info: TensorInfo, source: Checkpoint) -> None:
        """Write the bytes of `source`'s tensor `info` under `name`; they are copied in the kernel and never enter
        this process, unless `source` dequantizes it."""
        self._require_apart(source.folder)
        if info.name in source.dequantized:
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

        self._submit(0, job)

    def _submit(self, nbytes: int, job: Any) -> None:
        try:
            self._jobs.submit(nbytes, job)
        except OSError as error:
            self._fail(error)

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

    def finish(self) -> Path:
        """Complete the output and put it in place; CheckpointError, with everything removed, if a tensor is missing."""
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
            return self.output
        except OSError as error:
            self.abort()
            self._fail(error)
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Stop and remove everything written; nothing to do after `finish`."""
        if self._state != "open":
            return
        self._state = "aborted"
        self._jobs.stop()
        self._close_files()
        self._staging.discard()

    def _close_files(self) -> None:
        # Dropped, not closed: an error of close() says nothing about files that are about to be removed.
        self._files.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.abort()
