"""A model folder read lazily: headers at once, tensors as views on the mapped shards.

Opening reads config.json, the index and the shards' headers, and refuses whatever does not fit together; no tensor
data is touched, neither torch nor the compiled module is needed. A tensor costs no memory of its own: it is the page
cache, and `release` takes its pages out of the process's resident set.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, nearest
from .dtypes import alignment, torch_dtype, torch_shape
from .folder import (
    CONFIG,
    DESCRIPTION,
    SHARD,
    checked_file,
    explain_missing_weights,
    is_plain_name,
    side_files,
    stem_of,
    weight_files,
)
from .header import DOWNLOAD_AGAIN, TensorInfo, read_header, read_object
from .native import host

if TYPE_CHECKING:
    from typing import Self

    import torch

    from .._host import MappedFile, Scales, Weight

__all__ = ["Checkpoint", "TensorInfo"]


FLOAT_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class Checkpoint:
    """A folder with config.json and model.safetensors, or shards and their index. Folders of other kinds hold `main`
    instead of config.json, and weight files whose names begin with `stem`.

    Attributes:
        folder: the path as given.
        config: config.json; for a folder of Ascend's tools its description stands in as `quantization_config`.
        tensors: every tensor by name, in the order of the files and of the data in them.
        files: the weight files' names, sorted.
        total_bytes: the sum of the tensors' bytes.
        side_files: what a copy of the model needs beside weights and config.json (`folder.side_files`).
        left_out: names of safetensors files in the folder that are no part of the model (`consolidated.safetensors`).
        parts: the tensors that a model is filled from; other ones than `tensors` where experts are stored as one.
        dequantized: names of tensors that are made of codes as they are read; none in this class.
        remade: names of tensors that no file holds as they are given here, `dequantized` or not; none in this class.
        gathered: those of them that `stored_weight` does not give; none in this class.

    Reading is thread-safe.
    """

    def __init__(self, folder: Path | str, *, main: str = CONFIG, stem: str | None = None) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder}: not a folder; give the folder that holds {main}")
        if not (self.folder / main).exists():
            what = "the folder of a Transformers model" if main == CONFIG else "another folder"
            raise CheckpointError(f"{self.folder}: no {main}; give {what}")
        self.config: dict[str, Any] = read_object(checked_file(self.folder, main))
        plain = main == CONFIG and "quantization_config" not in self.config
        if plain and (self.folder / DESCRIPTION).exists():
            described = read_object(checked_file(self.folder, DESCRIPTION))
            self.config["quantization_config"] = {"quant_method": "mindie", **described}
        stem = stem or stem_of(self.folder)
        self._single, self._index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
        present = weight_files(self.folder)
        weight_map = self._weight_map(present)
        self.files: list[str] = [self._single] if weight_map is None else sorted(set(weight_map.values()))
        self._sizes: dict[str, int] = {}
        self.tensors: dict[str, TensorInfo] = self._read_headers()
        if weight_map is not None:
            self._check_index(weight_map)
        self.parts: dict[str, TensorInfo] = self.tensors
        self.dequantized: frozenset[str] = frozenset()
        self.remade: frozenset[str] = frozenset()
        self.gathered: frozenset[str] = frozenset()
        self.left_out: list[str] = [name for name in present if name not in self._sizes]
        self.total_bytes: int = sum(info.nbytes for info in self.tensors.values())
        self.side_files: list[Path] = side_files(self.folder)
        self._mapped: dict[str, MappedFile] = {}
        self._lock = threading.Lock()
        self._closed = False

    def _weight_map(self, present: list[str]) -> dict[str, str] | None:
        """The index's map from tensor to file, None for a folder with a single weight file."""
        path = self.folder / self._index
        if not path.exists() and not path.is_symlink():
            stray = [name for name in present if SHARD.fullmatch(name)]
            if self._single in present and stray:
                raise CheckpointError(
                    f"{self.folder}: {self._single} beside {stray[0]}, and no {self._index} to tell which of them is "
                    "the model; remove the one that is not"
                )
            if self._single in present:
                return None
            if stray:
                raise CheckpointError(f"{self.folder}: {stray[0]}, but no {self._index}; complete the download")
            raise CheckpointError(f"{self.folder}: no weights: {explain_missing_weights(self.folder)}")
        index = read_object(checked_file(self.folder, self._index))
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{path}: no object 'weight_map' that names tensors; {DOWNLOAD_AGAIN}")
        for tensor, file in weight_map.items():
            if not isinstance(file, str) or not is_plain_name(file):
                raise CheckpointError(
                    f"{path}: tensor '{tensor}' is said to be in {file!r:.300}, which is not a plain file name; "
                    f"only files of the folder are read; {DOWNLOAD_AGAIN}"
                )
            if not file.endswith(".safetensors"):
                raise CheckpointError(
                    f"{path}: tensor '{tensor}' is in '{file}', which is not a safetensors file; convert the model"
                )
        named = set(weight_map.values())
        stray = [name for name in present if name not in named and (SHARD.fullmatch(name) or name == self._single)]
        if stray:
            raise CheckpointError(
                f"{self.folder}: {stray[0]} is not in {self._index}: left over from another version of the model, or "
                "the index is; remove one of them"
            )
        return weight_map

    def _read_headers(self) -> dict[str, TensorInfo]:
        tensors: dict[str, TensorInfo] = {}
        for file in self.files:
            path = checked_file(self.folder, file)
            found, self._sizes[file] = read_header(path)
            for name in found.keys() & tensors.keys():
                raise CheckpointError(
                    f"{path}: tensor '{name}' is also in {tensors[name].file}; which one is meant? {DOWNLOAD_AGAIN}"
                )
            tensors.update(found)
        if not tensors:
            raise CheckpointError(f"{self.folder / self.files[0]}: no tensor in it; {DOWNLOAD_AGAIN}")
        return tensors

    def _check_index(self, weight_map: dict[str, str]) -> None:
        path = self.folder / self._index
        for name, info in self.tensors.items():
            if name not in weight_map:
                raise CheckpointError(
                    f"{self.folder / info.file}: tensor '{name}' is missing from {self._index}; {DOWNLOAD_AGAIN}"
                )
            if weight_map[name] != info.file:
                raise CheckpointError(
                    f"{path}: tensor '{name}' is said to be in {weight_map[name]} but is in {info.file}; "
                    f"{DOWNLOAD_AGAIN}"
                )
        if len(weight_map) > len(self.tensors):
            name = next(name for name in weight_map if name not in self.tensors)
            raise CheckpointError(f"{path}: tensor '{name}' is not in {weight_map[name]}; {DOWNLOAD_AGAIN}")

    @property
    def model_dtype(self) -> str | None:
        """The dtype that config.json says the model has, as safetensors names it; None if it does not say."""
        for config in (self.config, *(v for v in self.config.values() if isinstance(v, dict))):
            name = str(config.get("dtype") or config.get("torch_dtype") or "")
            if name in FLOAT_NAMES:
                return FLOAT_NAMES[name]
        return None

    def info(self, name: str) -> TensorInfo:
        """Where tensor `name` lies; CheckpointError with the nearest name if there is none."""
        found = self.tensors.get(name)
        if found is None:
            raise CheckpointError(f"{self.folder}: no tensor '{name}'{nearest(name, self.tensors)}")
        return found

    def mapped(self, file: str) -> MappedFile:
        """The mapping of one weight file, made on first use."""
        with self._lock:
            if self._closed:
                raise CheckpointError(f"{self.folder}: the checkpoint was closed")
            mapped: MappedFile | None = self._mapped.get(file)
            if mapped is None:
                path = checked_file(self.folder, file)
                try:
                    mapped = host().MappedFile(path)
                except OSError as error:
                    raise CheckpointError(f"{path}: {error.strerror}") from error
                if mapped.size != self._sizes[file]:
                    raise CheckpointError(f"{path}: changed after its header was read; start again when it is complete")
                self._mapped[file] = mapped
            return mapped

    def tensor(self, name: str, populate: bool = True) -> torch.Tensor:
        """Tensor `name` as a view on the mapped file, without a copy. It must not be written to: that is a
        segmentation fault. It stays valid after `release` and `close`.

        Reads all of it, so that a failing disk is a CheckpointError and not a crash in the middle of a kernel;
        `populate=False` leaves it to the accesses, for who needs a few rows of a large tensor. Data that are not
        aligned to their dtype (files of old libraries) are copied.
        """
        return self._tensor(self.info(name), populate)

    def _tensor(self, info: TensorInfo, populate: bool) -> torch.Tensor:
        import torch

        dtype, shape = torch_dtype(info.dtype), torch_shape(info.dtype, info.shape)
        if info.nbytes == 0:
            return torch.empty(shape, dtype=dtype)
        mapped = self.mapped(info.file)
        if populate:
            with self._reading(info):
                mapped.populate(info.begin, info.end)
        # torch takes any object with the buffer protocol and keeps it alive.
        raw = torch.frombuffer(mapped, dtype=torch.uint8, count=info.nbytes, offset=info.begin)
        if info.begin % alignment(info.dtype):
            raw = raw.clone()
        return raw.view(dtype).reshape(shape)

    def member(self, name: str, index: int, populate: bool = True) -> torch.Tensor:
        """`tensor(name)[index]`, without reading the others."""
        info = self.info(name)
        return self._tensor(member_of(info, index), populate)

    def stored_weight(self, name: str) -> Weight:
        """Tensor `name`, a matrix in F32, BF16 or F16, as the kernels of `_host` read it, some rows at a time."""
        info = self.info(name)
        made: Weight = host().Weight(self.mapped(info.file), info.begin, info.dtype, *info.shape)
        return made

    def place(self, name: str) -> tuple[MappedFile, int]:
        """The file that tensor `name` is in, and where in it it begins."""
        info = self.info(name)
        return self.mapped(info.file), info.begin

    def read(self, name: str) -> bytes:
        """The bytes of tensor `name`, a small one."""
        info = self.info(name)
        with self._reading(info):
            mapped = self.mapped(info.file)
            mapped.populate(info.begin, info.end)
        return bytes(memoryview(mapped)[info.begin : info.end])

    def scales(self, name: str, rows: int, cols: int) -> Scales:
        """Tensor `name`, the scales of a grid of blocks, as the kernels of `_host` take them."""
        with self.reading(name):
            made: Scales = host().Scales(*self.place(name), self.info(name).dtype, rows, cols)
        return made

    def reading(self, name: str) -> AbstractContextManager[None]:
        """Within the block, tensor `name` is read: what fails is a CheckpointError that names it."""
        return self._reading(self.info(name))

    @contextmanager
    def _reading(self, info: TensorInfo) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(f"{self.folder / info.file}: tensor '{info.name}': {error.strerror}") from error

    def prefetch(self, name: str) -> None:
        """Start reading tensor `name` from disk, to have it when it is needed; returns at once."""
        self._prefetch(self.info(name))

    def _prefetch(self, info: TensorInfo) -> None:
        with self._reading(info):
            self.mapped(info.file).prefetch(info.begin, info.end)

    def release(self, name: str) -> None:
        """Take tensor `name` out of the resident set. Views on it stay valid; reading them maps it again."""
        self._release(self.info(name))

    def _release(self, info: TensorInfo) -> None:
        with self._lock:
            mapped = self._mapped.get(info.file)
        if mapped is not None:
            mapped.drop(info.begin, info.end)

    def close(self) -> None:
        """Drop the mappings; each goes when the last tensor on it does."""
        with self._lock:
            self._closed = True
            self._mapped.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def member_of(info: TensorInfo, index: int) -> TensorInfo:
    """Where `index` of the first dimension of a tensor lies."""
    each = (info.end - info.begin) // info.shape[0]
    begin = info.begin + index * each
    return replace(info, shape=info.shape[1:], begin=begin, end=begin + each)
