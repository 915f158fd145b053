"""A checkpoint whose experts are stacked (see `models.stacked_experts`), read as if each had tensors of its own.

Nothing is copied up front: a part is a view on the mapped file where it lies there as a matrix, and made as it is read
where its columns are rows of the file. Where experts stay as they are, `unsplit` gives back the stacked tensors, so
that an output holds them under the names that its readers know.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from ..checkpoint.dtypes import byte_size
from ..checkpoint.header import TensorInfo
from ..checkpoint.reader import Checkpoint
from ..models.families import family_of
from ..models.stacked_experts import Part, parts_of

if TYPE_CHECKING:
    import torch

    from .._host import MappedFile, Weight

FLOATS = ("F32", "BF16", "F16")


def split(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint`, or, if it stacks experts in a way that is known, the one with tensors for each expert."""
    shapes = {name: info.shape for name, info in checkpoint.tensors.items() if info.dtype in FLOATS}
    if not any(len(shape) == 3 for shape in shapes.values()):
        return checkpoint
    parts = parts_of(family_of(checkpoint.config), shapes)
    return StackedSource(checkpoint, parts) if parts else checkpoint


def unsplit(checkpoint: Checkpoint, whole: Callable[[set[str], set[str]], bool]) -> Checkpoint:
    """`checkpoint`, the experts of those layers stacked again for which `whole` says so, given the names of the stacked
    tensors and of their parts.
    """
    return checkpoint.unsplit(whole) if isinstance(checkpoint, StackedSource) else checkpoint


class StackedSource(Checkpoint):
    """The checkpoint with tensors for each expert behind `stored`, a plain one or one dequantized as it is read.
    `parts`: for each stacked tensor what it is taken apart into; `whole`: those that are not.
    """

    def __init__(
        self, stored: Checkpoint, parts: dict[str, dict[str, Part]], whole: frozenset[str] = frozenset()
    ) -> None:
        self._stored, self._parts = stored, parts
        self.folder, self.config, self.files = stored.folder, stored.config, stored.files
        self.left_out, self.side_files, self.total_bytes = stored.left_out, stored.side_files, stored.total_bytes
        self._places = {name: part for members in parts.values() for name, part in members.items()}
        self.parts: dict[str, TensorInfo] = dict(self._taken_apart(frozenset()))
        self.tensors = dict(self._taken_apart(whole)) if whole else self.parts
        # Those of one expert go with what they are parts of.
        self.dequantized = frozenset(self._named(stored.dequantized))
        across = {name for name, part in self._places.items() if not part.run}
        self.gathered = frozenset(across | (self._places.keys() & self.dequantized))
        self.remade = self.dequantized | frozenset(across)

    def _taken_apart(self, whole: Collection[str]) -> Iterable[tuple[str, TensorInfo]]:
        for name, info in self._stored.tensors.items():
            if name not in self._parts or name in whole:
                yield name, info
                continue
            each = (info.end - info.begin) // info.shape[0]
            for inner, part in self._parts[name].items():
                begin, end = info.begin + part.index * each, info.begin + (part.index + 1) * each
                if part.run and name not in self._stored.dequantized:
                    begin += byte_size(info.dtype, (part.rows.start, *part.shape[1:]))
                    end = begin + byte_size(info.dtype, part.shape)
                yield inner, replace(info, name=inner, shape=part.shape, begin=begin, end=end)

    def _named(self, names: Iterable[str]) -> Iterable[str]:
        """`names`, and those of their parts."""
        for name in names:
            yield name
            yield from self._parts.get(name, ())

    def unsplit(self, whole: Callable[[set[str], set[str]], bool]) -> StackedSource:
        """See `unsplit`."""
        layers: dict[str, list[str]] = {}
        for name in self._parts:
            layers.setdefault(name.rpartition(".")[0], []).append(name)
        kept = {
            name
            for members in layers.values()
            if whole(set(members), {part for stacked in members for part in self._parts[stacked]})
            for name in members
        }
        return StackedSource(self._stored, self._parts, frozenset(kept))

    def info(self, name: str) -> TensorInfo:
        """As in `Checkpoint`, of parts also where they are stacked."""
        return self.parts.get(name) or self._stored.info(name)

    def mapped(self, file: str) -> MappedFile:
        """See `Checkpoint`."""
        return self._stored.mapped(file)

    def tensor(self, name: str, populate: bool = True) -> torch.Tensor:
        """As in `Checkpoint`: one that does not lie in the file as it is given is made anew."""
        part = self._places.get(name)
        if part is None:
            return self._stored.tensor(name, populate)
        return self.of(self._stored.member(part.stacked, part.index, populate), part)

    @staticmethod
    def of(member: torch.Tensor, part: Part) -> torch.Tensor:
        """The `part` of its expert's matrix or bias as it is stored, its rows one after the other."""
        rows = member.t() if part.transposed else member
        return rows[part.rows].contiguous()

    def stored_weight(self, name: str) -> Weight:
        """As in `Checkpoint`, of all but the `gathered`."""
        return self._stored.stored_weight(name) if name not in self._places else super().stored_weight(name)

    def prefetch(self, name: str) -> None:
        """See `Checkpoint`."""
        self._prefetch(self.info(name)) if name in self._places else self._stored.prefetch(name)

    def release(self, name: str) -> None:
        """See `Checkpoint`."""
        self._stored._release(self.info(name)) if name in self._places else self._stored.release(name)

    def close(self) -> None:
        """See `Checkpoint`."""
        self._stored.close()
