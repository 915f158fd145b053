"""Every error a user can cause, with what is wrong, where, and what to do in its message."""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable


class QuantkitError(Exception):
    """Base of all errors that quantkit raises on purpose; the command line prints them without a traceback. `kept`:
    what a run had done by then, and how to go on.
    """

    kept = ""

    def __str__(self) -> str:
        return "; ".join(text for text in (super().__str__(), self.kept) if text)


class Interrupted(KeyboardInterrupt):
    """A signal asked the process to end, in the command line. `kept` as in QuantkitError."""

    kept = ""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class ConfigError(QuantkitError):
    """The configuration is wrong: unknown key, wrong type, missing file."""


class PlanError(QuantkitError):
    """The configuration is well-formed but does not fit the model or the machine."""


class CheckpointError(QuantkitError):
    """A checkpoint is malformed, or an output cannot be written."""


class CalibrationError(QuantkitError):
    """Calibration data cannot be used, or statistics are not finite."""


class DistributedError(QuantkitError):
    """The processes of a run cannot work together, or one of them is gone."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the closest of `valid`, else the empty string; to append to a message."""
    match = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f" (did you mean '{match[0]}'?)" if match else ""
