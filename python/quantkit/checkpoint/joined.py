"""A second writer of an output, in another process: it writes its tensors into the files that the first has made."""

from __future__ import annotations

from pathlib import Path

from .background import BackgroundJobs
from .layout import Layout
from .native import host
from .staging import partial_path
from .writer import CheckpointWriter


class JoinedWriter(CheckpointWriter):
    """Writes tensors of `layout` into what another process's CheckpointWriter has begun for `output`. `complete` makes
    them last; side files and the end are the other's, who is told by `names` which tensors are written.
    """

    def __init__(self, layout: Layout, output: Path | str, max_pending_bytes: int = 64 << 20) -> None:
        self._prepare(layout, output)
        self._folder = partial_path(self.output)
        try:
            for shard in layout.shards:
                self._files[shard.file] = host().OutputFile(self._folder / shard.file, shard.size, reopen=True)
        except OSError as error:
            self._fail(error)
        self._jobs = BackgroundJobs("quantkit-writer", max_pending_bytes)

    def complete(self) -> list[str]:
        """Everything given so far is on disk; the names of these tensors."""
        try:
            self._jobs.drain()
            for file in self._files.values():
                file.sync()
        except OSError as error:
            self._fail(error)
        return sorted(self._claimed)

    def finish(self) -> Path:
        """Not here: the first writer does it."""
        raise NotImplementedError

    def abort(self) -> None:
        """Stop; what is written stays for the first writer to remove or keep."""
        if self._state == "open":
            self._state = "left"
            self._jobs.stop()
            self._close_files()
