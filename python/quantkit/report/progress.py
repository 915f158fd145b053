"""What is running and how long is left, on stderr. Nothing is shown for work that ends within two seconds."""

from __future__ import annotations

import sys
from types import TracebackType

from tqdm import tqdm


class Progress:
    """A context in which `advance` is called with the amount done; `unit` "B" counts bytes. A total that is not known
    at first (0) comes with `expect`.
    """

    def __init__(self, title: str, *, total: int, unit: str, enabled: bool = True) -> None:
        self._bar = tqdm(
            desc=title,
            total=total,
            unit=unit,
            unit_scale=True,
            delay=2.0,
            # A log gets a line now and then, a terminal a bar that moves.
            mininterval=0.1 if sys.stderr.isatty() else 10.0,
            disable=not enabled,
            dynamic_ncols=True,
        )

    def expect(self, total: int) -> None:
        """How much there is to do."""
        self._bar.total = total  # reset() would show the bar at once

    def advance(self, amount: int) -> None:
        self._bar.update(amount)

    def note(self, text: str) -> None:
        """What was done last, behind the bar."""
        self._bar.set_postfix_str(text, refresh=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
