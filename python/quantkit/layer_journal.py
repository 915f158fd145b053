"""The journal of a job that goes layer by layer, and how a later process takes it up where an earlier one was stopped.

The journal's header is the job's fingerprint. A line stands for a decoder layer, or, where no data is needed, for some
tensors: the names of what is on disk for good, where the next layer's hidden states lie, and what the layer added to
the report. It is appended by the writer's thread, behind everything it speaks of, while the next layer is worked on.
Hidden states lie in two files in turn, so that those of the last line are never being overwritten.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NoReturn, Protocol, TypeVar, get_args, get_origin, get_type_hints

from tqdm import tqdm

from .checkpoint.folder import HIDDEN_STATES
from .checkpoint.journal import START_OVER, Journal
from .checkpoint.native import host
from .checkpoint.staging import JOURNAL, Resume
from .errors import CheckpointError, Interrupted, QuantkitError
from .fingerprint import differences

if TYPE_CHECKING:
    from .calibration.hidden import HiddenStates
    from .calibration.layer import SweepReport

# Of how many differences are named at most.
_NAMED = 8
# Hidden states are read in pieces of this size.
_PIECE = 1 << 20
_UNITS = {"layer", "tensors", "hidden", "report", "sweep"}


class Writer(Protocol):
    """What a journal asks of whoever writes what it tells of. See `CheckpointWriter`."""

    resumable: bool

    @property
    def output(self) -> Path: ...
    @property
    def working_folder(self) -> Path: ...
    @property
    def published(self) -> bool: ...
    def commit(self, then: Callable[[list[str]], None]) -> None: ...
    def drain(self) -> None: ...
    def abort(self) -> None: ...


W = TypeVar("W", bound=Writer)


class LayerJournal(Generic[W]):
    """The journal of one job, a sweep's `Keeper`. `open` makes the writer (`make`: output, overwrite, see
    `staging.Resume`), with what an earlier process left counted as written; `known`: whether it can have written a
    thing of that name. `rest`: what a complete output still needs.

    `tell` is called with a line for the user when something is gone on with.
    """

    def __init__(
        self,
        make: Callable[[Path, bool, Resume], W],
        known: Callable[[str], bool],
        fingerprint: Mapping[str, str],
        *,
        layers: int = 0,
        restart: bool = False,
        tell: Callable[[str], None] = lambda _: None,
        rest: str = "nothing is left to do",
    ) -> None:
        self.fingerprint, self.layers = dict(fingerprint), layers
        self.begin = 0
        self._make, self._known, self._rest = make, known, rest
        self._restart, self._tell = restart, tell
        self._report: Any = None
        self._marks: dict[str, dict[str, int]] = {}
        self._done: set[str] = set()  # by an earlier process
        self._durable = 0  # tensors that any line names
        self._begun = 0  # layers that lines have done
        self._hidden: dict[str, Any] | None = None
        self._journal: Journal | None = None
        self._writer: W | None = None

    # ---- opening -------------------------------------------------------------------------------------------------

    def open(self, output: Path, overwrite: bool) -> W:
        """The job's writer. CheckpointError where what an earlier process left is of another job, or damaged."""
        try:
            writer = self._make(output, overwrite, self._offered)
        except BaseException:
            self.close()
            raise
        try:
            if self._journal is None:
                header = {"fingerprint": self.fingerprint}
                try:
                    self._journal = Journal.create(writer.working_folder / JOURNAL, header)
                    host().fsync_directory(writer.output.parent)
                except OSError as error:
                    raise CheckpointError(f"{error.filename}: {error.strerror}") from error
            elif writer.published:
                self._tell(f"resuming: {writer.output} is complete, and {self._rest}")
            else:
                self._tell(f"resuming {self._where()} ({writer.working_folder})")
        except BaseException:
            writer.abort()
            self.close()
            raise
        self._writer = writer
        return writer

    @property
    def done_before(self) -> frozenset[str]:
        """Tensors that an earlier process has done."""
        return frozenset(self._done)

    @property
    def hidden_path(self) -> Path | None:
        """Where the hidden states lie that it left."""
        if self._hidden is None or self._writer is None:
            return None
        return self._writer.working_folder / HIDDEN_STATES[self._hidden["file"]]

    def _where(self) -> str:
        if self.begin < self.layers:
            return f"at layer {self.begin} of {self.layers}"
        return f"behind the last of {self.layers} layers"

    def _offered(self, folder: Path, published: bool) -> Collection[str] | None:
        """See `staging.Resume`."""
        if self._restart:
            if not published:
                self._tell(f"starting over: {folder} is removed")
            return None
        path = folder / JOURNAL
        journal = Journal.load(path)
        if journal is None:
            return None
        self._journal = journal
        try:
            changed = self._changed(path, journal.header)
            if changed and published:
                journal.close()
                self._journal = None
                return None
            if changed:
                more = [f"and {len(changed) - _NAMED} more"] if len(changed) > _NAMED else []
                raise CheckpointError(
                    f"{folder}: holds an unfinished run that was not the same: "
                    f"{'; '.join([*changed[:_NAMED], *more])}. Run it as it was, or {START_OVER}"
                )
            self._read(path, journal.records)
        except BaseException:
            journal.close()
            raise
        return self._done

    def _changed(self, path: Path, header: dict[str, Any]) -> list[str]:
        old = header.get("fingerprint")
        if not isinstance(old, dict) or not all(isinstance(value, str) for value in old.values()):
            _refuse(path, "has no fingerprint")
        # Of an untrusted file: nothing but one printable line goes to the terminal.
        clean = {_printable(key): _printable(value) for key, value in old.items()}
        return differences(clean, {_printable(key): _printable(value) for key, value in self.fingerprint.items()})

    def _read(self, path: Path, records: Sequence[Mapping[str, Any]]) -> None:
        """What the lines say, every value checked."""
        for number, record in enumerate(records):
            where = f"line {number + 2}"
            names = record.get("tensors")
            if not record.keys() <= _UNITS or not isinstance(names, list):
                _refuse(path, f"{where} is none of this quantkit's")
            for name in names:
                if not isinstance(name, str) or not self._known(name) or name in self._done:
                    _refuse(path, f"{where} names tensor {name!r:.100}, which is not planned, or named twice")
                self._done.add(name)
            if ("layer" in record) != bool(self.layers):
                _refuse(path, f"{where} is of another kind of run")
            if self.layers:
                layer = record["layer"]
                if type(layer) is not int or not self.begin <= layer < self.layers:
                    _refuse(path, f"{where} is of layer {layer!r:.20}, behind which others come")
                self.begin = layer + 1
                self._hidden = record.get("hidden")
                if self._hidden is not None:
                    self._check_hidden(path, where, self._hidden)
        self._durable, self._begun = len(self._done), self.begin

    def _check_hidden(self, path: Path, where: str, hidden: Any) -> None:
        keys = {"file": int, "bytes": int, "digest": str}
        right = isinstance(hidden, dict) and hidden.keys() == keys.keys()
        if not right or any(type(hidden[key]) is not kind for key, kind in keys.items()):
            _refuse(path, f"{where} does not tell where hidden states lie")
        if hidden["file"] not in range(len(HIDDEN_STATES)):
            _refuse(path, f"{where} has hidden states in file {hidden['file']}")

    # ---- a sweep's keeper ----------------------------------------------------------------------------------------

    def report(self, report: Any) -> None:
        """What the run tells, a dataclass, goes there; what the layers that are done told is put there now."""
        self._report = report
        self._apply("report", report)

    def restore(self, hidden: HiddenStates | None, report: SweepReport) -> None:
        """See `calibration.layer.Keeper`."""
        self._apply("sweep", report)
        if hidden is None:
            self._remove_hidden()
            return
        assert self._writer is not None and self._journal is not None
        if self._hidden is None:
            _refuse(self._journal.path, f"line {self.begin + 1} names no hidden states, and layer {self.begin} is left")
        path = self._writer.working_folder / HIDDEN_STATES[self._hidden["file"]]
        if self._hidden["bytes"] != hidden.nbytes:
            _refuse(path, f"has {self._hidden['bytes']} bytes, and these batches' hidden states {hidden.nbytes}")
        if _digest(path) != self._hidden["digest"]:
            _refuse(path, "is damaged: other hidden states were written there")
        hidden.load(path)

    def keep_hidden(self, index: int, hidden: HiddenStates) -> Path:
        """Write what enters the layer behind `index`, and say where. Waits until the line before is on disk, so that
        nothing needs the file that is written.
        """
        assert self._writer is not None
        self._writer.drain()
        path = hidden.file or self._writer.working_folder / HIDDEN_STATES[index % 2]
        hidden.save(path, lasting=False)
        return path

    def layer_done(
        self, index: int, hidden: HiddenStates | None, report: SweepReport, kept: Path | None = None
    ) -> None:
        """See `calibration.layer.Keeper`. Returns before the line is on disk, unless hidden states
        are no longer needed. `kept`: what `keep_hidden` gave, if it has been called."""
        assert self._writer is not None
        record: dict[str, Any] = {"layer": index, "sweep": self._news("sweep", report)}
        if self._report is not None:
            record["report"] = self._news("report", self._report)
        path = kept
        if hidden is not None:
            path = self.keep_hidden(index, hidden) if path is None else path
            number = HIDDEN_STATES.index(path.name)
            record["hidden"] = {"file": number, "bytes": hidden.nbytes}

        def then(names: list[str]) -> None:
            if path is not None:
                record["hidden"]["digest"] = _digest(path)
                _sync(path)
            self._append({**record, "tensors": names})

        self._writer.commit(then)
        if hidden is None:
            self._remove_hidden()
        elif hidden.file is not None:
            hidden.before_put = self._writer.drain

    def _remove_hidden(self) -> None:
        """Once no line needs them."""
        assert self._writer is not None
        paths = [self._writer.working_folder / name for name in HIDDEN_STATES]
        if any(path.exists() for path in paths):
            self._writer.drain()
            for path in paths:
                path.unlink(missing_ok=True)

    # ---- ending --------------------------------------------------------------------------------------------------

    def kept(self) -> str | None:
        """What a later process would find done, and how to go on; None if that is nothing."""
        if self._writer is None or not self._writer.resumable or self._writer.published:
            return None
        what = f"{self._begun} of {self.layers} layers" if self.layers else f"{self._durable} tensors"
        return f"{what} are done and kept in {self._writer.working_folder}; the same command goes on from there"

    def kept_by(self, error: BaseException) -> str | None:
        """As `kept`, once all that can be kept is: called when `error` ends the run."""
        if self._writer is not None:
            # What the error was may well stop this, too; it is the one to be told.
            with contextlib.suppress(Exception):
                if isinstance(error, Exception):
                    self._writer.drain()
                else:
                    self.save()
        return self.kept()

    def keep(self, error: BaseException) -> None:
        """`error` ends the job: bring to disk what can be, and tell the user what is kept."""
        if (kept := self.kept_by(error)) is not None:
            if isinstance(error, QuantkitError | Interrupted):
                error.kept = kept
            else:
                tqdm.write(f"quantkit: {kept}", file=sys.stderr)

    def save(self) -> None:
        """Journal now what is done: for a job that is stopped."""
        if self._writer is not None:
            self._writer.drain()

    def close(self) -> None:
        """Nothing is journaled after."""
        if self._journal is not None:
            self._journal.close()

    def _append(self, record: dict[str, Any]) -> None:
        assert self._writer is not None and self._journal is not None
        self._journal.append(record)
        self._durable += len(record["tensors"])
        self._begun = record.get("layer", -1) + 1
        self._writer.resumable = True

    # ---- reports -------------------------------------------------------------------------------------------------

    def _news(self, key: str, report: Any) -> dict[str, Any]:
        """What has been added to `report` since the last time: lists and dicts only ever grow, numbers as they are."""
        marks, news = self._marks.setdefault(key, {}), {}
        for name, value in _values(report).items():
            if isinstance(value, list | dict):
                entries = list(value.items()) if isinstance(value, dict) else value
                news[name] = [_plain(entry) for entry in entries[marks.get(name, 0) :]]
                marks[name] = len(entries)
            else:
                news[name] = value
        return news

    def _apply(self, key: str, report: Any) -> None:
        """Put what the lines have under `key` into `report`."""
        hints = get_type_hints(type(report))
        for number, record in enumerate(() if self._journal is None else self._journal.records):
            try:
                for name, news in record[key].items():
                    old = _values(report)[name]
                    if isinstance(old, list):
                        old += _typed(news, hints[name])
                    elif isinstance(old, dict):
                        key_hint, value_hint = get_args(hints[name])
                        old.update({_typed(k, key_hint): _typed(v, value_hint) for k, v in news})
                    else:
                        setattr(report, name, _typed(news, hints[name]))
            except (ValueError, KeyError, TypeError, AttributeError):
                assert self._journal is not None
                _refuse(self._journal.path, f"line {number + 2} has a report that is none of this quantkit's")
        self._marks[key] = {k: len(v) for k, v in _values(report).items() if isinstance(v, list | dict)}


def _plain(entry: Any) -> Any:
    if isinstance(entry, tuple):
        return [_plain(part) for part in entry]
    return asdict(entry) if is_dataclass(entry) and not isinstance(entry, type) else entry


def _values(report: Any) -> dict[str, Any]:
    """Fields that are data."""
    found = {field.name: getattr(report, field.name) for field in fields(report)}
    return {name: value for name, value in found.items() if isinstance(value, int | float | str | list | dict)}


def _typed(value: Any, hint: Any) -> Any:
    """`value`, as JSON gives it, as what `hint` says; ValueError if it is not."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is list and isinstance(value, list):
        return [_typed(entry, args[0]) for entry in value]
    if origin is tuple and isinstance(value, list) and args[1:] == (...,):
        return tuple(_typed(entry, args[0]) for entry in value)
    if origin is tuple and isinstance(value, list) and len(value) == len(args):
        return tuple(_typed(entry, arg) for entry, arg in zip(value, args, strict=True))
    if is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        hints = get_type_hints(hint)
        return hint(**{str(key): _typed(entry, hints[key]) for key, entry in value.items()})
    if origin is None and isinstance(hint, type):
        if type(value) is hint:
            return value
        if hint is float and type(value) is int:
            return float(value)
    elif origin is not list and origin is not tuple:
        for arg in args:  # a union
            if arg is type(None) and value is None:
                return None
            if arg is not type(None):
                return _typed(value, arg)
    raise ValueError(f"{value!r:.50} is no {hint}")


def _printable(text: str) -> str:
    clean = "".join(c if c.isprintable() else "?" for c in str(text)[:300])
    return clean if len(str(text)) <= 300 else f"{clean}..."


def _refuse(path: Path, why: str) -> NoReturn:
    raise CheckpointError(f"{path}: {why}, so it is not trusted; {START_OVER}")


def _digest(path: Path) -> str:
    """Tells a file from any other, as far as accidents go: a hash of the sums of its pieces, at the speed of memory."""
    import numpy as np

    piece, sums = bytearray(_PIECE), hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while count := file.readinto(piece):
                piece[count:] = bytes(_PIECE - count)
                sums.update(int(np.frombuffer(piece, np.uint64).sum(dtype=np.uint64)).to_bytes(8, "little"))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; {START_OVER}") from error
    return sums.hexdigest()


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} while flushing to disk", str(path)) from error
    finally:
        os.close(fd)
    host().fsync_directory(path.parent)
