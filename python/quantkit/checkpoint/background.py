"""One thread that does jobs in order, with a bound on the memory they hold."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable


class BackgroundJobs:
    """Runs jobs in the order of `submit`. The first error stops it and is raised by every later call.

    Jobs that wait or run hold at most `max_bytes` together, or one job of any size: `submit` blocks until the new
    one fits. Jobs of 0 bytes never block.
    """

    def __init__(self, name: str, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._jobs: deque[tuple[int, Callable[[], None]]] = deque()
        self._held = 0  # bytes of the jobs that wait or run
        self._running = False
        self._stopped = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        # A daemon: an exception elsewhere must not leave the process waiting for a thread that waits for jobs.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, nbytes: int, job: Callable[[], None]) -> None:
        """Queue `job`, which keeps `nbytes` bytes alive until it is done."""
        with self._changed:
            while nbytes and self._held and self._held + nbytes > self._max_bytes and self._error is None:
                self._changed.wait()
            self._raise()
            self._jobs.append((nbytes, job))
            self._held += nbytes
            self._changed.notify_all()

    def drain(self) -> None:
        """Wait until every job is done."""
        with self._changed:
            while (self._jobs or self._running) and self._error is None:
                self._changed.wait()
            self._raise()

    def stop(self) -> None:
        """Drop the jobs that wait, let the one that runs end, and end the thread."""
        with self._changed:
            self._stopped = True
            self._jobs.clear()
            self._changed.notify_all()
        self._thread.join()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
        if self._stopped:
            raise RuntimeError("the background thread was stopped")

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._jobs and not self._stopped:
                    self._changed.wait()
                if self._stopped:
                    return
                nbytes, job = self._jobs.popleft()
                self._running = True
            error: BaseException | None = None
            try:
                job()
            except BaseException as caught:  # submit() and drain() raise it
                error = caught
            del job  # and with it the tensor, before the next submit may pass
            with self._changed:
                self._held -= nbytes
                self._running = False
                if error is not None:
                    self._error = error
                    self._stopped = True
                    self._jobs.clear()
                self._changed.notify_all()
