"""The folder an output is made in, `<output>.partial`, and the rename that publishes it.

Nothing is ever seen at the output's path but nothing, the old output, or the complete new one. A file in the folder
marks it as quantkit's, so that what a killed run left can be removed without asking; a lock on that file tells
a killed run from a running one. A folder with a journal is never removed without asking: it is gone on with.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from ..errors import CheckpointError
from .folder import CONFIG
from .native import host

MARKER, JOURNAL = ".quantkit-partial", ".quantkit-journal"
_log = logging.getLogger("quantkit")

# Asked what to do with a folder that a killed run left, and whether that is complete: the names of the tensors in it
# that are done; None to start over. CheckpointError refuses.
Resume = Callable[[Path, bool], Collection[str] | None]


def partial_path(output: Path) -> Path:
    """Where `output` is made."""
    return output.with_name(output.name + ".partial")


class StagingFolder:
    """Claims `<output>.partial`; then either `publish` and `seal`, `discard`, or `leave` it to be resumed.

    With `resume`, a folder of a killed run is offered to it: `done` are then the tensors that are in it (None for a
    new folder). `published`: that run had come to the end, and there is nothing to do but `seal`. `main`: a file that
    every finished output has.
    """

    def __init__(self, output: Path, overwrite: bool, resume: Resume | None = None, *, main: str = CONFIG) -> None:
        self.output, self._main = output, main
        self.path = partial_path(output)
        self.done: Collection[str] | None = None
        self.published = False
        self._replaced = output.with_name(output.name + ".replaced")
        self._overwrite = overwrite
        self._lock = -1
        if not output.name:
            raise CheckpointError(f"'{output}' cannot be an output folder; give a path with a name")
        if output.is_symlink() or (output.exists() and not output.is_dir()):
            raise CheckpointError(f"{output}: exists and is not a folder; give another output path")
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            stale = _lock_stale(self.path)
            try:
                self._recover()
                if stale is None and self._was_complete(resume):
                    return
                self._check_output()
                if stale is not None:
                    if self._goes_on(resume):
                        self._lock, stale = stale, None
                        return
                    _remove(self.path)
            finally:
                if stale is not None:
                    os.close(stale)
            self._lock = _claim(self.path)
        except OSError as error:
            raise CheckpointError(
                f"{error.filename or output}: {error.strerror}; choose another output path"
            ) from error

    def _recover(self) -> None:
        """Complete what a run killed within `publish` left: the old output moved aside, the new one in place or not."""
        if not self._replaced.exists():
            return
        if not (self._replaced / MARKER).exists():
            raise CheckpointError(f"{self._replaced}: in the way, and not made by quantkit; move it elsewhere")
        if self.output.exists():
            _remove(self._replaced)
        else:
            _log.warning("%s: a run was killed while it replaced it; the old one is restored", self.output)
            os.rename(self._replaced, self.output)
            (self.output / MARKER).unlink(missing_ok=True)

    def _was_complete(self, resume: Resume | None) -> bool:
        """Whether a run was killed between `publish` and `seal` and is the one to go on with; else it is sealed now."""
        if not (self.output / MARKER).exists():
            return False
        lock = _lock_marker(self.output)
        try:
            if resume is not None and (self.output / JOURNAL).exists():
                self.done = resume(self.output, True)
            if self.done is not None:
                self._lock, self.published = lock, True
                return True
            self._unmark()
        finally:
            if not self.published:
                os.close(lock)
        return False

    def _goes_on(self, resume: Resume | None) -> bool:
        """Whether the partial folder, which is locked, is to be gone on with; it may be removed if not."""
        journaled = (self.path / JOURNAL).exists() or (self.path / JOURNAL).is_symlink()
        if resume is not None and journaled:
            self.done = resume(self.path, False)
            return self.done is not None
        if journaled:
            raise CheckpointError(
                f"{self.path}: unfinished, and can be resumed; finish it by the same command, or remove it"
            )
        _log.warning("%s: left by a run that did not finish; removed", self.path)
        return False

    def _check_output(self) -> None:
        if not self.output.exists() or not any(self.output.iterdir()):
            return
        if not self._overwrite:
            raise CheckpointError(
                f"{self.output}: exists already; choose another save_path, or allow it to be replaced (--overwrite)"
            )
        if not (self.output / self._main).is_file():
            raise CheckpointError(
                f"{self.output}: has no {self._main}, so it is no earlier output and is not deleted; remove it yourself"
            )

    def publish(self) -> None:
        """Rename the folder to the output's path, durably. An old output is deleted only after that."""
        native = host()
        try:
            native.fsync_directory(self.path)
            self._check_output()  # another process may have put one there meanwhile
            old = self.output.exists() and any(self.output.iterdir())
            if old:
                (self.output / MARKER).touch()
                os.rename(self.output, self._replaced)
            try:
                os.rename(self.path, self.output)
            except OSError:
                if old:
                    os.rename(self._replaced, self.output)
                    (self.output / MARKER).unlink()
                raise
            self.published = True
            native.fsync_directory(self.output.parent)
            if old:
                _remove(self._replaced)
        except OSError as error:
            raise CheckpointError(
                f"{self.output}: cannot be put in place: {error.strerror}; the result is in {self.path}"
            ) from error

    def seal(self) -> None:
        """Take out of the published folder what marks it as quantkit's to go on with."""
        # Only now: a complete folder without the marker at the partial path could not be told from a stranger's.
        self._unmark()
        self.leave()

    def _unmark(self) -> None:
        for name in (JOURNAL, MARKER):
            (self.output / name).unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove the folder and all that was written."""
        _remove(self.path)
        self.leave()

    def leave(self) -> None:
        """Let go of the folder as it is."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


class JoinedFolder(StagingFolder):
    """The partial folder of another process, in which this one writes, too: it neither claims nor removes it."""

    def __init__(self, output: Path) -> None:
        self.output, self._main, self.path = output, CONFIG, partial_path(output)
        self.done, self.published, self._lock = (), False, -1
        if not (self.path / MARKER).exists():
            raise CheckpointError(f"{self.path}: is not there; another process was to make it")

    def publish(self) -> None:
        raise CheckpointError(f"{self.path}: is finished by the process that made it")

    def discard(self) -> None:
        """The folder's own process decides."""


def reclaimable_bytes(output: Path) -> int:
    """What an unfinished output of this name takes on disk: a run goes on in it, or takes its place."""
    partial = partial_path(output)
    if not (partial / MARKER).exists():
        return 0
    total = 0
    for entry in os.scandir(partial):
        with contextlib.suppress(FileNotFoundError):  # its run may be at work
            total += 512 * entry.stat(follow_symlinks=False).st_blocks
    return total


def _lock_stale(path: Path) -> int | None:
    """The descriptor of a stale partial folder's locked marker; None if there is no such folder."""
    if not path.exists() and not path.is_symlink():
        return None
    try:
        marker = os.open(path / MARKER, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno == errno.ENOENT and not path.is_symlink() and path.is_dir() and not any(path.iterdir()):
            path.rmdir()  # killed between the folder's and the marker's creation
            return None
        raise CheckpointError(f"{path}: in the way, and not made by quantkit; move it elsewhere") from error
    return _locked(marker, path)


def _lock_marker(path: Path) -> int:
    return _locked(os.open(path / MARKER, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW), path)


def _locked(marker: int, path: Path) -> int:
    if not _try_lock(marker):
        os.close(marker)
        raise CheckpointError(f"{path}: another run is writing it; wait for that one, or choose another save_path")
    return marker


def _claim(path: Path) -> int:
    path.mkdir()  # fails if another run was faster
    marker = os.open(path / MARKER, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666)
    os.write(marker, f"quantkit, process {os.getpid()}: an unfinished output, safe to delete\n".encode())
    return _locked(marker, path)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        # Some network file systems have no locks: two runs at once then meet at mkdir, or not at all.
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise
    return True


def _remove(folder: Path) -> None:
    """Delete the folder, the journal first, since what it tells of goes, and the marker last, so that a removal that is
    cut short can be taken up again.
    """
    with contextlib.suppress(FileNotFoundError):  # another run removes the same leftovers
        (folder / JOURNAL).unlink(missing_ok=True)
        for entry in os.scandir(folder):
            if entry.name == MARKER:
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)
        (folder / MARKER).unlink(missing_ok=True)
        folder.rmdir()
