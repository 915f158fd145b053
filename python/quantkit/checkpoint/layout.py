"""The output's weight files fixed to the byte before anything is written: shards, headers, offsets, index.

A pure function of the tensors' names, dtypes, shapes and order, of the shard size and of the metadata. So tensors may
be written in any order, and a journal needs only the names of those that are done.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import CheckpointError
from .dtypes import alignment, byte_size
from .folder import MODEL
from .header import MAX_HEADER

_JOURNAL_VERSION = 2


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor to be written; `dtype` as safetensors names it ("BF16", "I32")."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return byte_size(self.dtype, self.shape)


@dataclass(frozen=True)
class Shard:
    """One weight file: `header` is its first bytes, `ranges` gives each tensor's absolute [begin, end) in it."""

    file: str
    header: bytes
    size: int
    tensors: tuple[OutputTensor, ...]
    ranges: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Layout:
    """All weight files of an output; `stem` begins their names. `shard_of` and `tensors` are by tensor name."""

    shards: tuple[Shard, ...]
    metadata: dict[str, str]
    stem: str = MODEL
    shard_of: dict[str, Shard] = field(init=False, repr=False, compare=False)
    tensors: dict[str, OutputTensor] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shard_of", {t.name: shard for shard in self.shards for t in shard.tensors})
        object.__setattr__(self, "tensors", {t.name: t for shard in self.shards for t in shard.tensors})

    @property
    def total_size(self) -> int:
        """The sum of the tensors' bytes, as the index has it."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def file_bytes(self) -> int:
        """What the weight files take on disk, headers and index included."""
        return sum(shard.size for shard in self.shards) + len(self.index_bytes or b"")

    @property
    def index_name(self) -> str:
        """What the index is called."""
        return f"{self.stem}.safetensors.index.json"

    @property
    def index(self) -> dict[str, Any] | None:
        """The content of model.safetensors.index.json; None for a single file, which has none."""
        if len(self.shards) == 1:
            return None
        weight_map = {name: self.shard_of[name].file for name in sorted(self.tensors)}
        return {"metadata": {"total_size": self.total_size}, "weight_map": weight_map}

    @property
    def index_bytes(self) -> bytes | None:
        index = self.index
        return None if index is None else (json.dumps(index, indent=2) + "\n").encode()

    def to_json(self) -> str:
        """A text from which `from_json` makes the same layout; offsets and headers follow from it."""
        shards = [[[t.name, t.dtype, list(t.shape)] for t in shard.tensors] for shard in self.shards]
        value = {"version": _JOURNAL_VERSION, "metadata": self.metadata, "stem": self.stem, "shards": shards}
        return json.dumps(value)

    @classmethod
    def from_json(cls, text: str) -> Layout:
        try:
            value = json.loads(text)
            if value["version"] != _JOURNAL_VERSION:
                raise ValueError(f"version {value['version']}, this quantkit reads {_JOURNAL_VERSION}")
            groups = [[OutputTensor(n, d, tuple(s)) for n, d, s in shard] for shard in value["shards"]]
            metadata = {str(key): str(text) for key, text in value["metadata"].items()}
            stem = str(value["stem"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"saved layout cannot be read ({error!r}); start the output anew") from error
        return _layout(groups, metadata, stem)


def plan_layout(
    tensors: Iterable[OutputTensor],
    max_shard_bytes: int,
    metadata: Mapping[str, str] | None = None,
    stem: str = MODEL,
) -> Layout:
    """Distribute `tensors` over shards of at most `max_shard_bytes` of data, in the order given.

    A shard is closed when the next tensor would not fit; a tensor that is larger than a shard gets one of its own.
    One shard is called <stem>.safetensors, several <stem>-00001-of-00004.safetensors and so on. `metadata` becomes
    `__metadata__`; the default is what Transformers wants to see.
    """
    if max_shard_bytes < 1:
        raise CheckpointError(f"max_shard_bytes is {max_shard_bytes}; it must be positive")
    groups: list[list[OutputTensor]] = []
    filled = 0
    for tensor in tensors:
        nbytes = _checked_size(tensor)
        if not groups or (groups[-1] and filled + nbytes > max_shard_bytes):
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += nbytes
    return _layout(groups, {"format": "pt"} if metadata is None else dict(metadata), stem)


def _checked_size(tensor: OutputTensor) -> int:
    if not isinstance(tensor.name, str) or tensor.name in ("", "__metadata__"):
        raise CheckpointError(f"output tensor name {tensor.name!r} cannot be used in safetensors")
    try:
        tensor.name.encode()
        return tensor.nbytes
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"output tensor {tensor.name!r}: {error}") from error


def _layout(groups: Sequence[Sequence[OutputTensor]], metadata: dict[str, str], stem: str) -> Layout:
    names: set[str] = set()
    for tensor in (t for group in groups for t in group):
        _checked_size(tensor)
        if tensor.name in names:
            raise CheckpointError(f"output tensor '{tensor.name}' is planned twice")
        names.add(tensor.name)
    if not names or not all(groups):
        raise CheckpointError("the output, or one of its files, has no tensor; is the model empty?")
    count = len(groups)
    numbers = [""] if count == 1 else [f"-{i:05d}-of-{count:05d}" for i in range(1, count + 1)]
    files = [f"{stem}{number}.safetensors" for number in numbers]
    shards = tuple(_shard(file, group, metadata) for file, group in zip(files, groups, strict=True))
    return Layout(shards, metadata, stem=stem)


def _shard(file: str, tensors: Sequence[OutputTensor], metadata: dict[str, str]) -> Shard:
    # safetensors allows no holes, so padding cannot align a tensor. The header is padded to 8 bytes and the widest
    # types come first: each tensor's size is a multiple of its own alignment, hence of every later one's.
    # Within a width the order is kept, so that a model written layer by layer is written front to back.
    ordered = sorted(tensors, key=lambda tensor: -alignment(tensor.dtype))
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    relative: list[tuple[str, int, int]] = []
    position = 0
    for tensor in ordered:
        end = position + tensor.nbytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        relative.append((tensor.name, position, end))
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise CheckpointError(
            f"{file}: its {len(tensors)} tensors need a header of {len(text)} bytes, safetensors allows {MAX_HEADER}; "
            "lower global.max_shard_size"
        )
    header = len(text).to_bytes(8, "little") + text
    ranges = {name: (len(header) + begin, len(header) + end) for name, begin, end in relative}
    return Shard(file, header, len(header) + position, tuple(ordered), ranges)
