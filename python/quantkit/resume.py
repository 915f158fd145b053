"""A run that goes on where an earlier process was stopped; see `layer_journal`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from .checkpoint.writer import CheckpointWriter
from .layer_journal import LayerJournal

if TYPE_CHECKING:
    from .checkpoint.layout import Layout

# Where no data is needed, tensors are journaled after so many bytes, or seconds.
BATCH_BYTES, BATCH_SECONDS = 1 << 30, 4.0


class Resumption(LayerJournal[CheckpointWriter]):
    """The journal of one run. `open` makes the writer, with what an earlier process left counted as written. Then
    either a sweep uses it as its `Keeper`, or `has` and `done` are used for tensors. `pending`: bytes that may wait for
    the disk.
    """

    def __init__(
        self,
        layout: Layout,
        fingerprint: Mapping[str, str],
        *,
        layers: int = 0,
        restart: bool = False,
        tell: Callable[[str], None] = lambda _: None,
        pending: int = 64 << 20,
    ) -> None:
        super().__init__(
            lambda output, overwrite, resume: CheckpointWriter(layout, output, overwrite, pending, resume=resume),
            layout.tensors.__contains__,
            fingerprint,
            layers=layers,
            restart=restart,
            tell=tell,
            rest="only its audit is left",
        )
        self.layout = layout
        self._lock = threading.Lock()
        self._pending: list[str] = []
        self._pending_bytes = 0
        self._last = time.monotonic()
        self._busy = False

    def _where(self) -> str:
        if not self.layers:
            return f"with {len(self._done)} of {len(self.layout.tensors)} tensors done"
        return super()._where()

    def has(self, names: Iterable[str]) -> bool:
        """Whether all of these tensors of the output were done by an earlier process."""
        return self._done.issuperset(names)

    def done(self, names: Iterable[str]) -> None:
        """These have all been given to the writer, and belong together: a later process does all of them again, or
        none. Journaled now and then. From any thread.
        """
        assert self._writer is not None
        with self._lock:
            names = list(names)
            self._pending += names
            self._pending_bytes += sum(self.layout.tensors[name].nbytes for name in names)
            if not self._busy and (
                self._pending_bytes >= BATCH_BYTES or time.monotonic() - self._last >= BATCH_SECONDS
            ):
                self._commit()

    def _commit(self) -> None:
        assert self._writer is not None

        def then(names: list[str]) -> None:
            try:
                self._append({"tensors": names})
            finally:
                with self._lock:
                    self._last, self._busy = time.monotonic(), False

        names, self._pending, self._pending_bytes, self._busy = self._pending, [], 0, True
        self._writer.commit(then, names)

    def save(self) -> None:
        """Journal now what is done: for a run that is stopped."""
        assert self._writer is not None
        with self._lock:
            if self._pending:
                self._commit()
        self._writer.drain()
