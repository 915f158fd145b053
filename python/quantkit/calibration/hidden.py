"""The calibration buffer: what enters a decoder layer, for all batches, in memory or in two files that take turns."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from ..errors import CalibrationError
from .batches import Batch

# Files are read and written in pieces of this size.
_PIECE = 64 << 20
# What Linux calls it; Python's mmap has no name for it before 3.13.
_POPULATE_READ = 22


class HiddenStates:
    """Hidden states of all batches. `view(i)` [rows, tokens, hidden] is what enters the layer at hand, `put(i, x)` what
    enters the next one, `turn()` goes over to that.

    In memory there is one buffer, and `put` replaces what entered. With a `folder` a layer reads one file there and
    writes the other, so that what entered it stays whole until the next `turn`, and neither is resident but for the
    batches that are worked on (`rest` lets go of one). Files that are there already keep what is in them.
    """

    def __init__(
        self, of: Sequence[Batch], hidden_size: int, dtype: torch.dtype, *, folder: Path | None = None
    ) -> None:
        self.dtype = dtype
        self._shapes = [(*batch.input_ids.shape, hidden_size) for batch in of]
        each = hidden_size * dtype.itemsize
        self._begins = [0]
        for batch in of:
            self._begins.append(self._begins[-1] + batch.input_ids.numel() * each)
        self.nbytes = self._begins[-1]
        self._now = 0
        self._files: list[_StateFile] = []
        self._buffer = torch.empty(0, dtype=torch.uint8)
        if folder is None:
            self._buffer = torch.empty(self.nbytes, dtype=torch.uint8)
        else:
            self._files = [_StateFile(folder / f"hidden-states-{i}", self.nbytes) for i in range(2)]

    def __len__(self) -> int:
        return len(self._shapes)

    @property
    def file(self) -> Path | None:
        """Where what enters the layer at hand lies, None in memory. Nothing but `turn` starts to overwrite it."""
        return self._files[self._now].path if self._files else None

    def view(self, index: int) -> Tensor:
        """What enters the layer at hand in batch `index`; not to be written to."""
        begin, end = self._begins[index], self._begins[index + 1]
        raw = self._raw(begin, end)
        return raw.view(self.dtype).view(self._shapes[index])

    def _raw(self, begin: int, end: int) -> Tensor:
        return self._files[self._now].read(begin, end) if self._files else self._buffer[begin:end]

    def put(self, index: int, value: Tensor) -> None:
        """What enters the next layer in batch `index`; of any floating-point dtype."""
        if self._files:
            data = value.detach().to(self.dtype).reshape(self._shapes[index]).contiguous()
            raw = data.view(-1).view(torch.uint8).numpy().data
            self._files[1 - self._now].write(raw, self._begins[index])
        else:
            self.view(index).copy_(value)

    def rest(self, index: int) -> None:
        """Batch `index` is not read for a while: its part of a file leaves the resident set. Views stay valid."""
        if self._files:
            self._files[self._now].drop(self._begins[index], self._begins[index + 1])

    def turn(self) -> None:
        """Every batch has been put: what was put is what enters the layer at hand from now on."""
        if self._files:
            self._now = 1 - self._now

    def save(self, path: Path) -> None:
        """Write what enters the layer at hand to `path` (raw bytes, in the order of the batches) and make it lasting;
        what is there already (`file`) is not written again. CalibrationError if that fails.
        """
        try:
            if self._files and path == self._files[self._now].path:
                os.fsync(self._files[self._now].fileno)
                return
            with open(path, "wb", buffering=0) as file:
                for begin in range(0, self.nbytes, _PIECE):
                    end = min(begin + _PIECE, self.nbytes)
                    _write_all(file.fileno(), self._raw(begin, end).numpy().data, begin)
                    if self._files:
                        self._files[self._now].drop(begin, end)
                os.fsync(file.fileno())
        except OSError as error:
            _fail(path, error)

    def load(self, path: Path) -> None:
        """Read what `save` wrote to `path`. CalibrationError if it is not there, or not of these batches."""
        for i, own in enumerate(self._files):
            if path == own.path:
                self._now = i
                return
        try:
            with open(path, "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                if size != self.nbytes:
                    raise CalibrationError(f"{path}: has {size} bytes, and these batches' hidden states {self.nbytes}")
                for begin in range(0, self.nbytes, _PIECE):
                    piece = os.pread(file.fileno(), min(_PIECE, self.nbytes - begin), begin)
                    if self._files:
                        self._files[self._now].write(memoryview(piece), begin)
                    else:
                        self._buffer[begin : begin + len(piece)] = torch.frombuffer(bytearray(piece), dtype=torch.uint8)
        except OSError as error:
            _fail(path, error)

    def remove(self) -> None:
        """Delete the files, if there are any; nothing else may be done after."""
        for file in self._files:
            file.remove()
        self._files = []


class _StateFile:
    """A file of fixed size: written by calls that report a full or failing disk, read as a mapping."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
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
            _write_all(self.fileno, data, offset)
        except OSError as error:
            _fail(self.path, error)

    def drop(self, begin: int, end: int) -> None:
        """Take the pages that lie within [begin, end), and those on its edges, out of the resident set."""
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
