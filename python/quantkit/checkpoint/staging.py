"""The folder an output is made in, `<output>.partial`, and the rename that publishes it.

Nothing is ever seen at the output's path but nothing, the old output, or the complete new one. A file in the folder
marks it as quantkit's, so that what a killed run left can be removed without asking; a lock on that file tells
a killed run from a running one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
from pathlib import Path

from ..errors import CheckpointError
from .folder import CONFIG
from .native import host

MARKER = ".quantkit-partial"
_log = logging.getLogger("quantkit")


def partial_path(output: Path) -> Path:
    """Where `output` is made."""
    return output.with_name(output.name + ".partial")


class StagingFolder:
    """Claims `<output>.partial`; then either `publish` or `discard`. `main`: a file that every finished output has."""

    def __init__(self, output: Path, overwrite: bool, *, main: str = CONFIG) -> None:
        self.output, self._main = output, main
        self.path = partial_path(output)
        self._replaced = output.with_name(output.name + ".replaced")
        self._overwrite = overwrite
        if not output.name:
            raise CheckpointError(f"'{output}' cannot be an output folder; give a path with a name")
        if output.is_symlink() or (output.exists() and not output.is_dir()):
            raise CheckpointError(f"{output}: exists and is not a folder; give another output path")
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            stale = _lock_stale(self.path)
            try:
                self._recover()
                self._check_output()
                if stale is not None:
                    _log.warning("%s: left by a run that did not finish; removed", self.path)
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
            native.fsync_directory(self.output.parent)
            # Only now: a complete folder without the marker at the partial path could not be told from a stranger's.
            (self.output / MARKER).unlink()
            if old:
                _remove(self._replaced)
        except OSError as error:
            raise CheckpointError(
                f"{self.output}: cannot be put in place: {error.strerror}; the result is in {self.path}"
            ) from error
        finally:
            os.close(self._lock)

    def discard(self) -> None:
        """Remove the folder and all that was written."""
        _remove(self.path)
        os.close(self._lock)


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
    if not _try_lock(marker):
        os.close(marker)
        raise CheckpointError(f"{path}: another run is writing it; wait for that one, or choose another save_path")
    return marker


def _claim(path: Path) -> int:
    path.mkdir()  # fails if another run was faster
    marker = os.open(path / MARKER, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666)
    os.write(marker, f"quantkit, process {os.getpid()}: an unfinished output, safe to delete\n".encode())
    if not _try_lock(marker):
        os.close(marker)
        raise CheckpointError(f"{path}: another run is writing it; wait for that one, or choose another save_path")
    return marker


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
    """Delete the folder, the marker last, so that a removal that is cut short can be taken up again."""
    with contextlib.suppress(FileNotFoundError):  # another run removes the same leftovers
        for entry in os.scandir(folder):
            if entry.name == MARKER:
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)
        (folder / MARKER).unlink(missing_ok=True)
        folder.rmdir()
