"""What of an output is done, so that a run that was killed goes on: lines that are only ever added.

A line is `<crc32 in hex> <JSON object>`, on disk before `append` returns. The first is the header. What stands behind
the last complete line was being written when the process died, and is ignored; any other damage refuses the journal.
The checksum tells damage, not malice: whoever reads a journal checks every value in it.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import zlib
from pathlib import Path
from typing import Any, NoReturn

from ..errors import CheckpointError
from .native import host

FORMAT = 1
# A layer of a thousand experts takes a megabyte.
_MAX_BYTES = 1 << 30


class Journal:
    """`create` or `load` one; then `append` and `close`. `records`: what has been added, without the header."""

    def __init__(self, path: Path, fd: int, header: dict[str, Any], records: list[dict[str, Any]], end: int) -> None:
        self.path, self.header, self.records = path, header, records
        self._fd, self._end = fd, end

    @classmethod
    def create(cls, path: Path, header: dict[str, Any]) -> Journal:
        """A new one, its header and its name in the folder on disk."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        journal = cls(path, os.open(path, flags, 0o666), header, [], 0)
        try:
            journal._add({"format": FORMAT, **header})
            host().fsync_directory(path.parent)
        except BaseException:
            journal.close()
            with contextlib.suppress(OSError):
                path.unlink()
            raise
        return journal

    @classmethod
    def load(cls, path: Path) -> Journal | None:
        """What stands at `path`, ready to go on; None if it is no more than the beginning of a header, with which
        nothing can have been lost. CheckpointError for what no run can have left there.
        """
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}; {START_OVER}") from error
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
                _refuse(path, "not a regular file of its own")
            if status.st_size > _MAX_BYTES:
                _refuse(path, f"has {status.st_size} bytes, more than any run writes")
            try:
                records, end = _parsed(path, _read(fd, status.st_size))
                if not records:
                    os.close(fd)
                    return None
                if end != status.st_size:
                    os.ftruncate(fd, end)
                    os.fsync(fd)
            except OSError as error:
                raise CheckpointError(f"{path}: {error.strerror}; {START_OVER}") from error
            header = records[0]
            if header.pop("format", None) != FORMAT:
                _refuse(path, f"is of another format than this quantkit's, {FORMAT}")
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(fd)
            raise
        return cls(path, fd, header, records[1:], end)

    def append(self, record: dict[str, Any]) -> None:
        """Add a line; it is on disk when this returns. OSError leaves the journal as it was, or with a torn line."""
        self._add(record)
        self.records.append(record)

    def _add(self, record: dict[str, Any]) -> None:
        text = json.dumps(record, separators=(",", ":")).encode()
        data = memoryview(b"%08x %s\n" % (zlib.crc32(text), text))
        end = self._end
        try:
            while len(data):
                written = os.pwrite(self._fd, data, end)
                data, end = data[written:], end + written
            os.fsync(self._fd)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._end)
            raise OSError(error.errno, f"{error.strerror} while writing the journal", str(self.path)) from error
        self._end = end

    def close(self) -> None:
        """Nothing can be added after."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


START_OVER = "start over with --restart"


def _read(fd: int, size: int) -> bytes:
    parts, offset = [], 0
    while offset < size and (part := os.pread(fd, min(size - offset, 64 << 20), offset)):
        parts.append(part)
        offset += len(part)
    return b"".join(parts)


def _parsed(path: Path, data: bytes) -> tuple[list[dict[str, Any]], int]:
    """The records, and how many bytes they take: all but a last line that is torn."""
    lines, end = data.split(b"\n"), 0
    torn = lines.pop()  # behind the last line's end
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines):
        record = _record(line)
        if record is None:
            # The disk may have got a line's end before its beginning; nothing was ever put behind such a line.
            if number == len(lines) - 1 and not torn:
                break
            _refuse(path, f"line {number + 1} is damaged")
        records.append(record)
        end += len(line) + 1
    return records, end


def _record(line: bytes) -> dict[str, Any] | None:
    """The object in a line; None if the line is not whole."""
    checksum, space, text = line[:8], line[8:9], line[9:]
    if space != b" " or b"%08x" % zlib.crc32(text) != checksum:
        return None
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _refuse(path: Path, why: str) -> NoReturn:
    raise CheckpointError(f"{path}: {why}, so what it says is not trusted; {START_OVER}")
