"""`quantkit merge-statistics`: what several machines saw of one model, each with its share of the data, as one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch

from .calibration.statistics import Statistics
from .calibration.statistics_check import StatisticsFile
from .calibration.statistics_file import Contents, wants
from .calibration.statistics_writer import StatisticsWriter
from .errors import CalibrationError
from .report.progress import Progress

# Inputs go into one file until there are so many bytes.
PORTION = 1 << 30


def merge_statistics(
    folders: Sequence[Path | str], output: Path | str, *, overwrite: bool = False, progress: bool = True
) -> Path:
    """The sums, ranges and counts of all `folders`, of one model, gathered alike, and of different data.
    Sums are added in the order of the folders. CalibrationError for what does not fit.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(StatisticsFile(folder)) for folder in folders]
        _check(files)
        kinds = files[0].contents.kinds
        data = [entry for file in files for entry in file.contents.data]
        contents = Contents(files[0].contents.fingerprint, kinds, data)
        inputs = _inputs(files)
        expected = sum(t.nbytes for file in files for t in file.contents.tensors()) // len(files)
        writer = stack.enter_context(StatisticsWriter(output, contents, overwrite=overwrite, expected=expected))
        bar = stack.enter_context(Progress("merge", total=len(inputs), unit="input", enabled=progress))
        batch: dict[str, Statistics] = {}
        held = 0
        for readers in inputs:
            batch.update(dict.fromkeys(readers, _sum(files, readers)))
            channels = len(batch[readers[0]].min)
            held += 4 * channels * channels if "gram" in kinds else 0
            if held > PORTION:
                writer.add(batch, {})
                batch, held = {}, 0
            bar.advance(1)
        caches = {}
        for name in {**files[0].contents.caches, **files[0].contents.queries}:
            kept = [file.cache(name) for file in files]
            caches[name] = {part: torch.stack([one[part] for one in kept]).amax(0) for part in kept[0]}
        writer.add(batch, caches)
        silent = (name for file in files for name in file.contents.silent)
        contents.silent[:] = [n for n in dict.fromkeys(silent) if all(n not in file.inputs for file in files)]
        return writer.finish()


def _check(files: Sequence[StatisticsFile]) -> None:
    first = files[0]
    if len(files) < 2:
        raise CalibrationError(f"{first.folder}: one folder of statistics alone cannot be merged; give two or more")
    whose: dict[str, Path] = {}
    for file in files:
        mine, theirs = asdict(first.contents.fingerprint), asdict(file.contents.fingerprint)
        for told, of in ((mine, first.contents), (theirs, file.contents)):
            told |= {"kinds": set(of.kinds), "caches": of.caches, "queries": of.queries}
        differ = [key for key in mine if mine[key] != theirs[key]]
        if differ:
            words = {"model": "are of another model", "config": "are of a model with another config.json"}
            how = words.get(differ[0], f"have another {differ[0]} ({theirs[differ[0]]}, and not {mine[differ[0]]})")
            raise CalibrationError(f"{file.folder}: its statistics {how} than those of {first.folder}")
        again = [row for entry in file.contents.data for row in entry.rows if row in whose]
        if again:
            raise CalibrationError(
                f"{file.folder}: {len(again)} of its rows are in {whose[again[0]]} too, and would count twice; give "
                "each machine rows of its own"
            )
        whose.update({row: file.folder for entry in file.contents.data for row in entry.rows})


def _inputs(files: Sequence[StatisticsFile]) -> list[tuple[str, ...]]:
    """The readers of every input that any file has, in the order of the first file that has it."""
    found: dict[str, tuple[str, ...]] = {}
    for file in files:
        for entry in file.contents.inputs.values():
            for reader in entry.readers:
                if found.setdefault(reader, entry.readers) != entry.readers:
                    raise CalibrationError(
                        f"{file.folder}: {reader} reads one input with {', '.join(entry.readers[:4])}, elsewhere with "
                        f"{', '.join(found[reader][:4])}; the statistics cannot be of one model"
                    )
            others = [other for other in files if entry.name in other.inputs]
            if any(other.inputs[entry.name].channels != entry.channels for other in others):
                raise CalibrationError(f"{file.folder}: {entry.name} is not as wide as elsewhere")
    return list(dict.fromkeys(found.values()))


def _sum(files: Sequence[StatisticsFile], readers: tuple[str, ...]) -> Statistics:
    total: Statistics | None = None
    for file in files:
        if readers[0] in file.inputs:
            seen = file.load(file.inputs[readers[0]], wants(file.contents.kinds))
            if total is None:
                total = seen
            else:
                total.merge(seen)
    assert total is not None
    return total
