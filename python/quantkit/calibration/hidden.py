"""The calibration buffer: what enters a decoder layer, for all batches, in memory or in two files that take turns."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from ..checkpoint.folder import HIDDEN_STATES
from ..errors import CalibrationError
from .batches import Batch

# Files are read and written in pieces of this size.
_PIECE = 64 << 20
# What Linux calls it; Python's mmap has no name for it before 3.13.
_POPULATE_READ = 22


class BatchBuffer:
    """A matrix for each batch, all of one width and dtype, in memory or in the file `path`; only the batches that are
    worked on are resident then. A file that is there already keeps what is in it. `within` (rows before these, rows of
    all): other processes have the rest, and a file holds what all have, each working on its part.
    """

    def __init__(
        self,
        rows: Sequence[int],
        width: int,
        dtype: torch.dtype,
        path: Path | None = None,
        within: tuple[int, int] | None = None,
    ) -> None:
        self.width, self.dtype, self.path = width, dtype, path
        self._begins = [0]
        for count in rows:
            self._begins.append(self._begins[-1] + count * width * dtype.itemsize)
        self.nbytes = self._begins[-1]
        before, every = within or (0, sum(rows))
        self.offset, self.total = before * width * dtype.itemsize, every * width * dtype.itemsize
        self._file = None if path is None else _StateFile(path, self.total, self.offset)
        self._memory = torch.empty(self.nbytes if path is None else 0, dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self._begins) - 1

    def view(self, index: int) -> Tensor:
        """[rows, width] of batch `index`. What is written to it is there, as by `put`."""
        raw = self.raw(self._begins[index], self._begins[index + 1])
        return raw.view(self.dtype).view(-1, self.width)

    def put(self, index: int, value: Tensor) -> None:
        """Replace batch `index` by value [..., width] of any floating-point dtype."""
        if self._file is None:
            self.view(index).copy_(value.reshape(-1, self.width))
            return
        data = value.detach().to(self.dtype).reshape(-1, self.width).contiguous()
        self.write(data.view(-1).view(torch.uint8).numpy().data, self._begins[index])

    def rest(self, index: int) -> None:
        """Batch `index` is not read for a while: its part of a file leaves the resident set. Views stay valid."""
        self.drop(self._begins[index], self._begins[index + 1])

    def raw(self, begin: int, end: int) -> Tensor:
        """Bytes [begin, end), a view."""
        return self._memory[begin:end] if self._file is None else self._file.read(begin, end)

    def write(self, data: memoryview, offset: int) -> None:
        """Put bytes there."""
        if self._file is None:
            self._memory[offset : offset + len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        else:
            self._file.write(data, offset)

    def drop(self, begin: int, end: int) -> None:
        """Bytes [begin, end) of a file leave the resident set."""
        if self._file is not None:
            self._file.drop(begin, end)

    def sync(self) -> None:
        """A file's content outlives the machine's next crash. OSError if it does not."""
        if self._file is not None:
            os.fsync(self._file.fileno)

    def remove(self) -> None:
        """Free the memory, or delete the file; nothing else may be done after."""
        if self._file is not None:
            self._file.remove()
        self._memory = torch.empty(0, dtype=torch.uint8)


class HiddenStates:
    """Hidden states of all batches. `view(i)` [rows, tokens, hidden] is what enters the layer at hand, `put(i, x)` what
    enters the next one, `turn()` goes over to that.

    In memory there is one buffer, and `put` replaces what entered. With a `folder` a layer reads one file there and
    writes the other, so that what entered it stays whole until the next `turn`. Files that are there already keep what
    is in them. `within` (tokens before these batches, tokens of all): other processes have the rest.
    """

    def __init__(
        self,
        of: Sequence[Batch],
        hidden_size: int,
        dtype: torch.dtype,
        *,
        folder: Path | None = None,
        within: tuple[int, int] | None = None,
    ) -> None:
        self.dtype = dtype
        self._shapes = [(*batch.input_ids.shape, hidden_size) for batch in of]
        rows = [batch.input_ids.numel() for batch in of]
        paths = [None] if folder is None else [folder / name for name in HIDDEN_STATES]
        self._buffers = [BatchBuffer(rows, hidden_size, dtype, path, within) for path in paths]
        self._now = 0
        # Called before the first `put` behind a `turn`, which with files starts to overwrite what entered before.
        self.before_put: Callable[[], None] | None = None

    def __len__(self) -> int:
        return len(self._shapes)

    @property
    def file(self) -> Path | None:
        """Where what enters the layer at hand lies, None in memory. Nothing but `turn` starts to overwrite it."""
        return self._buffers[self._now].path

    def view(self, index: int) -> Tensor:
        """What enters the layer at hand in batch `index`; not to be written to."""
        return self._buffers[self._now].view(index).view(self._shapes[index])

    def put(self, index: int, value: Tensor) -> None:
        """What enters the next layer in batch `index`; of any floating-point dtype."""
        if self.before_put is not None:
            wait = self.before_put
            self.before_put = None
            wait()
        self._buffers[self._next].put(index, value)

    def rest(self, index: int) -> None:
        """Batch `index` is not read for a while: its part of a file leaves the resident set. Views stay valid."""
        self._buffers[self._now].rest(index)

    def turn(self) -> None:
        """Every batch has been put: what was put is what enters the layer at hand from now on."""
        self._now = self._next

    @property
    def _next(self) -> int:
        return (self._now + 1) % len(self._buffers)

    @property
    def nbytes(self) -> int:
        """Of all batches, those of other processes among them."""
        return self._buffers[0].total

    def save(self, path: Path, *, lasting: bool = True) -> None:
        """Write what enters the layer at hand to `path` (raw bytes, in the order of the batches) and make it lasting,
        or leave that to an fsync of the file; what is there already (`file`) is not written again. Of several processes
        each writes its part, and `path` is complete once all have. CalibrationError if that fails.
        """
        buffer = self._buffers[self._now]
        try:
            if path == buffer.path:
                if lasting:
                    buffer.sync()
                return
            # What is there already is overwritten, not cut off first: freeing its blocks would take as long, and other
            # processes may have written their parts.
            with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b", buffering=0) as file:
                os.ftruncate(file.fileno(), buffer.total)
                for begin in range(0, buffer.nbytes, _PIECE):
                    end = min(begin + _PIECE, buffer.nbytes)
                    _write_all(file.fileno(), buffer.raw(begin, end).numpy().data, buffer.offset + begin)
                    buffer.drop(begin, end)
                if lasting:
                    os.fsync(file.fileno())
        except OSError as error:
            _fail(path, error)

    def load(self, path: Path) -> None:
        """Read what `save` wrote to `path`. CalibrationError if it is not there, or not of these batches."""
        for i, own in enumerate(self._buffers):
            if path == own.path:
                self._now = i
                return
        buffer = self._buffers[self._now]
        try:
            with open(path, "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                if size != buffer.total:
                    raise CalibrationError(f"{path}: has {size} bytes, and these batches' hidden states {buffer.total}")
                for begin in range(0, buffer.nbytes, _PIECE):
                    piece = os.pread(file.fileno(), min(_PIECE, buffer.nbytes - begin), buffer.offset + begin)
                    buffer.write(memoryview(piece), begin)
        except OSError as error:
            _fail(path, error)

    def remove(self) -> None:
        """Free the memory, or delete the files; nothing else may be done after."""
        for buffer in self._buffers:
            buffer.remove()


class _StateFile:
    """A file of fixed size: written by calls that report a full or failing disk, read as a mapping. Positions are those
    behind `offset`.
    """

    def __init__(self, path: Path, size: int, offset: int) -> None:
        self.path, self.offset = path, offset
        try:
            self.fileno = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            os.ftruncate(self.fileno, size)
            # Reserved now, since a mapping of a file that has no room is a crash.
            os.posix_fallocate(self.fileno, 0, size)
            # Shared: the pages are the file's, and what `write` puts there is seen.
            self._map = mmap.mmap(self.fileno, size)
        except OSError as error:
            _fail(path, error)
        self._raw = torch.frombuffer(self._map, dtype=torch.uint8)

    def read(self, begin: int, end: int) -> Tensor:
        """Bytes [begin, end) as a view on the mapping."""
        begin, end = begin + self.offset, end + self.offset
        first = begin // mmap.PAGESIZE * mmap.PAGESIZE
        try:
            self._map.madvise(_POPULATE_READ, first, end - first)
        except OSError as error:
            # Kernels before 5.14 do not know it: pages come when they are read.
            if error.errno != 22:
                _fail(self.path, error)
        return self._raw[begin:end]

    def write(self, data: memoryview, offset: int) -> None:
        try:
            _write_all(self.fileno, data, self.offset + offset)
        except OSError as error:
            _fail(self.path, error)

    def drop(self, begin: int, end: int) -> None:
        """Take the pages that lie within [begin, end), and those on its edges, out of the resident set."""
        begin, end = begin + self.offset, end + self.offset
        first = begin // mmap.PAGESIZE * mmap.PAGESIZE
        with contextlib.suppress(OSError):
            self._map.madvise(mmap.MADV_DONTNEED, first, end - first)

    def remove(self) -> None:
        # The mapping goes with the last view on it.
        os.close(self.fileno)
        with contextlib.suppress(OSError):
            self.path.unlink()


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while len(data):
        written = os.pwrite(fd, data[:_PIECE], offset)
        data, offset = data[written:], offset + written


def _fail(path: Path, error: OSError) -> NoReturn:
    raise CalibrationError(
        f"{path}: {error.strerror}; hidden states lie there (calibration.offload): make room, or choose another "
        "global.save_path"
    ) from error
