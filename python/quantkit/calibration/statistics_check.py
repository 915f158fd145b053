"""Statistics read from disk, as input that may be hostile: refused where no calibration could have given them.

Headers, `statistics.json` and small tensors are looked at when the folder is opened, Gram matrices as they are read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from ..checkpoint.header import TensorInfo
from ..checkpoint.native import host
from ..checkpoint.reader import Checkpoint
from ..errors import CheckpointError, QuantkitError
from .fingerprint import Data, Fingerprint
from .statistics import Histogram, Statistics, Wants
from .statistics_file import FORMAT, KINDS, MAIN, STEM, VERSION, Contents, Input
from .symmetric import unpack

if TYPE_CHECKING:
    from typing import Self

ANEW = "make it anew with quantkit calibrate"
# What rounding may do to sums, and to products of very small numbers.
SLACK, TINY = 1e-2, 1e-30
MOST_CHANNELS, MOST_COUNT = 1 << 20, 1 << 48
ROWS = 1024


class StatisticsFile:
    """A folder that `StatisticsWriter` made; CheckpointError for any other.

    Attributes: `folder`; `contents`: what its `statistics.json` says; `inputs`: by the names of their readers.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        try:
            self._files = Checkpoint(self.folder, main=MAIN, stem=STEM)
        except CheckpointError as error:
            raise CheckpointError(f"statistics: {error}") from error
        try:
            self.contents = _contents(self._files.config)
            self.inputs: dict[str, Input] = {}
            for entry in self.contents.inputs.values():
                for reader in entry.readers:
                    if reader in self.inputs:
                        raise Refused(f"'{reader}' is said to read two inputs")
                    self.inputs[reader] = entry
            if both := self.inputs.keys() & set(self.contents.silent):
                raise Refused(f"'{min(both)}' is said to have read nothing, and has an input")
            self._check_tensors(self._files.tensors)
            for entry in self.contents.inputs.values():
                self._check(entry)
            for attention in {**self.contents.caches, **self.contents.queries}:
                self.cache(attention)
        except Refused as error:
            self.fail(str(error))

    def told(self) -> str:
        """What a plan says about where its statistics are from."""
        return (
            f"{self.folder} ({self.contents.rows} rows, {self.contents.tokens} tokens): every layer is worked on with "
            "the inputs that the full-precision model gives it; errors of layers before it are not taken into account"
        )

    def fail(self, problem: str) -> NoReturn:
        """Refuse the folder."""
        raise CheckpointError(f"{self.folder}: {problem}; {ANEW}")

    def _check_tensors(self, found: Mapping[str, TensorInfo]) -> None:
        """That the weight files hold what `statistics.json` says, all of it and no more."""
        expected = {}
        for tensor in self.contents.tensors():
            if tensor.name in expected:
                raise Refused(f"tensor '{tensor.name}' belongs to two entries")
            expected[tensor.name] = tensor
        for name, tensor in expected.items():
            info = found.get(name)
            if info is None:
                raise Refused(f"tensor '{name}' is missing")
            if (info.dtype, info.shape) != (tensor.dtype, tensor.shape):
                raise Refused(
                    f"tensor '{name}' is {info.dtype} {list(info.shape)}, and not {tensor.dtype} {list(tensor.shape)}"
                )
        if more := found.keys() - expected.keys():
            raise Refused(f"tensor '{min(more)}' belongs to no input")

    def _tensor(self, name: str) -> Tensor:
        """A copy: the file may be read again, and statistics are worked on in place."""
        found = self._files.tensor(name).clone()
        self._files.release(name)
        return found

    def _check(self, entry: Input) -> None:
        """Everything but the Gram matrix."""
        seen = self._small(entry, Wants("gram" in self.contents.kinds, "histogram" in self.contents.kinds))
        low, high, most = seen.min, seen.max, seen.absmax
        assert seen.extremes is not None
        for part, x in (("min", low), ("max", high), ("extremes", seen.extremes), ("absum", seen.absum)):
            if x is not None and not bool(torch.isfinite(x).all()):
                raise Refused(f"'{entry.name}.{part}' has NaN or Inf")
        if bool((low > high).any()):
            raise Refused(f"'{entry.name}': a channel's smallest value is above its largest")
        ends = torch.stack((seen.extremes[:, 0].amin(), seen.extremes[:, 1].amax()))
        if bool((seen.extremes[:, 0] > seen.extremes[:, 1]).any()) or ends.tolist() != [low.min(), high.max()]:
            raise Refused(f"'{entry.name}.extremes' do not fit its channels' ranges")
        if seen.absum is not None and bool(((seen.absum < 0) | (seen.absum > seen.count * most * (1 + SLACK))).any()):
            raise Refused(f"'{entry.name}.absum' is negative, or more than {seen.count} tokens can have")
        if seen.histogram is not None:
            self._check_histogram(entry, seen.histogram, float(most.max()))

    def _check_histogram(self, entry: Input, found: Histogram, most: float) -> None:
        counts, span = found.counts, float(found.span)
        values = entry.count * entry.channels
        if bool((counts < 0).any()) or bool((counts > values).any()) or int(counts.sum()) != values:
            raise Refused(f"'{entry.name}.histogram' does not count {values} values")
        power = span == 0 or (0 < span < 2.0**128 and span == 2.0 ** round(torch.log2(found.span.double()).item()))
        if not power or not (span > most or span == most == 0):
            raise Refused(f"'{entry.name}.span' is {span}, and not a power of two above {most}")

    def _small(self, entry: Input, wants: Wants) -> Statistics:
        """All but the Gram matrix."""
        name = entry.name
        histogram = None
        if wants.histogram:
            histogram = Histogram(self._tensor(f"{name}.histogram"), self._tensor(f"{name}.span"))
        return Statistics(
            entry.count,
            self._tensor(f"{name}.min"),
            self._tensor(f"{name}.max"),
            absum=self._tensor(f"{name}.absum") if wants.gram else None,
            histogram=histogram,
            extremes=self._tensor(f"{name}.extremes"),
        )

    def load(self, entry: Input, wants: Wants) -> Statistics:
        """The statistics of one input; CheckpointError for a Gram matrix that cannot be one."""
        seen = self._small(entry, wants)
        if wants.gram:
            try:
                packed = self._files.tensor(f"{entry.name}.gram")
                seen.gram = unpack(packed, entry.channels)
                del packed
                self._files.release(f"{entry.name}.gram")
                _check_gram(entry, seen, seen.gram)
            except Refused as error:
                self.fail(str(error))
        return seen

    def cache(self, attention: str) -> dict[str, Tensor]:
        """What there is of the largest magnitudes of its `key`, `value` and `query`, of each head."""
        parts = ["key", "value"] if attention in self.contents.caches else []
        parts += ["query"] if attention in self.contents.queries else []
        found = {part: self._tensor(f"{attention}.{part}") for part in parts}
        for part, x in found.items():
            if not bool((torch.isfinite(x) & (x >= 0)).all()):
                raise Refused(f"'{attention}.{part}' has NaN, Inf or negative magnitudes")
        return found

    def close(self) -> None:
        """Drop the mappings."""
        self._files.close()
        host().release_free_memory()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Refused(QuantkitError):
    """What is wrong with a folder, without its name."""


def _check_gram(entry: Input, seen: Statistics, gram: Tensor) -> None:
    """That it can be x^T x of so many tokens in these ranges: |x_i . x_j| <= |x_i| |x_j|."""
    squares = gram.diagonal()
    most = entry.count * seen.absmax.double().square() * (1 + SLACK) + TINY
    if not bool((torch.isfinite(squares) & (squares >= 0) & (squares <= most)).all()):
        raise Refused(
            f"'{entry.name}.gram' has sums of squares that are NaN, negative, or more than {entry.count} tokens have"
        )
    if seen.absum is not None and bool(
        (seen.absum.double().square() > entry.count * squares * (1 + SLACK) + TINY).any()
    ):
        raise Refused(f"'{entry.name}.absum' does not fit the sums of squares in its Gram matrix")
    norms = squares.sqrt()
    for rows, norm in zip(gram.split(ROWS), norms.split(ROWS), strict=True):
        # `not <=` so that NaN counts.
        if not bool((rows.abs() <= norm[:, None] * norms * (1 + SLACK) + TINY).all()):
            raise Refused(f"'{entry.name}.gram' has products that are larger than its sums of squares allow")


def _contents(value: Mapping[str, Any]) -> Contents:
    """`statistics.json`, checked."""
    if value.get("format") != FORMAT:
        raise Refused(f"{MAIN} does not say that it describes {FORMAT}")
    if value.get("version") != VERSION:
        raise Refused(f"{MAIN} is of version {value.get('version')!r:.20}, and this quantkit reads {VERSION}")
    kinds = value.get("kinds")
    if not isinstance(kinds, list) or any(kind not in KINDS for kind in kinds) or len(set(kinds)) < len(kinds):
        raise Refused(f"{MAIN}: kinds is {kinds!r:.100}, and not a list of {', '.join(KINDS)}")
    data = [_data(entry) for entry in _list(value, "data")]
    if not data:
        raise Refused(f"{MAIN}: data is empty")
    inputs = {}
    for name, entry in _object(value, "inputs").items():
        inputs[name] = _input(name, entry)
    if not inputs:
        raise Refused(f"{MAIN}: inputs is empty")
    caches = {name: _count(heads, f"caches.{name}", MOST_CHANNELS) for name, heads in _object(value, "caches").items()}
    if caches and "kv_cache" not in kinds:
        raise Refused(f"{MAIN}: caches without kv_cache in kinds")
    # Older files have none.
    asked = _object(value, "queries").items() if "queries" in value else ()
    queries = {name: _count(heads, f"queries.{name}", MOST_CHANNELS) for name, heads in asked}
    if queries and "queries" not in kinds:
        raise Refused(f"{MAIN}: queries without queries in kinds")
    return Contents(
        _fingerprint(_object(value, "fingerprint")),
        tuple(kinds),
        data,
        inputs,
        caches,
        queries,
        _names(value.get("silent"), "silent"),
    )


def _fingerprint(value: Mapping[str, Any]) -> Fingerprint:
    model, config = value.get("model"), value.get("config")
    dtype, every = value.get("dtype"), value.get("all_experts")
    if (
        set(value) != {"model", "config", "dtype", "all_experts"}
        or not all(isinstance(x, str) and re.fullmatch("[0-9a-f]{64}", x) for x in (model, config))
        or not isinstance(dtype, str)
        or not isinstance(every, bool)
    ):
        raise Refused(f"{MAIN}: fingerprint is not one of quantkit's")
    return Fingerprint(str(model), str(config), dtype, every)


def _data(value: Any) -> Data:
    if not isinstance(value, dict) or set(value) != {"rows", "tokens", "seed", "max_seq_length"}:
        raise Refused(f"{MAIN}: an entry of data is not an object of rows, tokens, seed and max_seq_length")
    rows = _names(value["rows"], "data.rows", unique=False)
    if not rows or any(re.fullmatch("[0-9a-f]{16}", row) is None for row in rows):
        raise Refused(f"{MAIN}: data.rows are not hashes of rows")
    tokens, length = _count(value["tokens"], "data.tokens"), _count(value["max_seq_length"], "data.max_seq_length")
    seed = value["seed"]
    if type(seed) is not int or seed < 0:
        raise Refused(f"{MAIN}: data.seed is {seed!r:.50}, and no seed")
    return Data(tuple(rows), tokens, seed, length)


def _input(name: str, value: Any) -> Input:
    if not isinstance(value, dict) or set(value) != {"readers", "channels", "count", "batches"}:
        raise Refused(f"{MAIN}: inputs.{name:.200} is not an object of readers, channels, count and batches")
    readers = _names(value["readers"], f"inputs.{name}.readers")
    if not readers or readers[0] != name:
        raise Refused(f"{MAIN}: inputs.{name:.200} is not named after the first of its readers")
    count = _count(value["count"], f"inputs.{name}.count")
    return Input(
        tuple(readers),
        _count(value["channels"], f"inputs.{name}.channels", MOST_CHANNELS),
        count,
        _count(value["batches"], f"inputs.{name}.batches", count),
    )


def _count(value: Any, where: str, most: int = MOST_COUNT) -> int:
    if type(value) is not int or not 1 <= value <= most:
        raise Refused(f"{MAIN}: {where:.200} is {value!r:.50}, and not a whole number from 1 to {most}")
    return value


def _object(value: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = value.get(key)
    if not isinstance(found, dict):
        raise Refused(f"{MAIN}: {key} is not an object")
    return found


def _list(value: Mapping[str, Any], key: str) -> list[Any]:
    found = value.get(key)
    if not isinstance(found, list):
        raise Refused(f"{MAIN}: {key} is not a list")
    return found


def _names(value: Any, where: str, unique: bool = True) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise Refused(f"{MAIN}: {where:.200} is not a list of names")
    if unique and len(set(value)) < len(value):
        raise Refused(f"{MAIN}: {where:.200} has a name twice")
    return list(value)
