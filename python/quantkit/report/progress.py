"""What is running and how long is left, on stderr. Nothing is shown for work that ends within two seconds."""

from __future__ import annotations

import sys
from types import TracebackType

from tqdm import tqdm


class Progress:
    """A context in which `advance` is called with the amount done; `unit` "B" counts bytes."""

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

    def advance(self, amount: int) -> None:
        self._bar.update(amount)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
