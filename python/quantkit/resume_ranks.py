"""A run of several ranks that goes on where earlier processes were stopped, of whatever number these were.

Rank 0 has the journal. Before it notes a layer, every rank has brought its tensors and its part of the hidden states to
disk, and has told which these are. Of a run without data rank 0 notes its own tensors only; what the others did is
done again.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .checkpoint.folder import HIDDEN_STATES
from .distributed import Ranks
from .layer_journal import LayerJournal
from .resume import Resumption

if TYPE_CHECKING:
    from .calibration.hidden import HiddenStates
    from .calibration.layer import SweepReport
    from .report.calibration import CalibrationReport


class Joined(Protocol):
    """What this rank writes. See `CheckpointWriter`."""

    @property
    def working_folder(self) -> Path: ...
    def drain(self) -> None: ...
    def flush(self) -> list[str]: ...
    def written_elsewhere(self, names: Iterable[str]) -> None: ...


class SharedResumption:
    """This rank's part in the journal of all, for `writer`. `first`: rank 0's own, which is open. See `Resumption`."""

    def __init__(self, first: LayerJournal[Any] | None, writer: Joined, ranks: Ranks) -> None:
        self._first, self._writer, self._ranks = first, writer, ranks
        begin, done = ranks.broadcast(None if first is None else (first.begin, first.done_before))
        self.begin: int = begin
        self._done: frozenset[str] = done
        self._report: CalibrationReport | None = None
        self._told = 0

    def report(self, report: CalibrationReport) -> None:
        """See `Resumption.report`: rank 0's has all."""
        self._report = report
        if self._first is not None:
            self._first.report(report)

    def restore(self, hidden: HiddenStates | None, report: SweepReport) -> None:
        """See `calibration.layer.Keeper`."""
        path: Path | None = None
        if self._first is not None:
            self._first.restore(hidden, report)
            path = self._first.hidden_path
        path = self._ranks.broadcast(path)
        if self._first is None and hidden is not None:
            assert path is not None
            hidden.load(self._writer.working_folder / path.name)

    def layer_done(self, index: int, hidden: HiddenStates | None, report: SweepReport) -> None:
        """See `calibration.layer.Keeper`."""
        if self._first is not None:
            self._writer.drain()  # the line before is on disk, and nothing needs the hidden states before it
        self._ranks.barrier()
        names: list[str] = []
        kept: Path | None = None
        if self._first is not None:
            if hidden is not None:  # at the same time as the others
                kept = self._first.keep_hidden(index, hidden)
        else:
            names = self._writer.flush()
            if hidden is not None:
                path = hidden.file or self._writer.working_folder / HIDDEN_STATES[index % 2]
                # On one machine rank 0's fsync is for all of the file.
                hidden.save(path, lasting=not self._ranks.one_machine)
        modules = [] if self._report is None else self._report.modules
        new, self._told = modules[self._told :], len(modules)
        smoothings = {} if self._report is None else self._report.smoothings
        told = self._ranks.gather((names, new, smoothings, report.expert_tokens, report.silent_experts))
        if self._first is None:
            return self._after(hidden)
        for theirs, modules, places, tokens, silent in told:
            self._writer.written_elsewhere(theirs)
            if self._report is not None:
                self._report.take_in(modules, places)
            report.expert_tokens |= {k: v for k, v in tokens.items() if k not in report.expert_tokens}
            report.silent_experts += [name for name in silent if name not in report.silent_experts]
        if self._report is not None:
            self._told = len(self._report.modules)
        self._first.layer_done(index, hidden, report, kept)
        if hidden is not None and hidden.file is not None:
            self._writer.drain()  # the others begin to overwrite what entered this layer
        self._after(hidden)

    def _after(self, hidden: HiddenStates | None) -> None:
        if hidden is not None and hidden.file is not None:
            self._ranks.barrier()

    def has(self, names: Iterable[str]) -> bool:
        """See `Resumption.has`."""
        return self._done.issuperset(names)

    def done(self, names: Iterable[str]) -> None:
        """See `Resumption.done`."""
        if isinstance(self._first, Resumption):
            self._first.done(names)
