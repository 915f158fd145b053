"""Parsing of safetensors headers and of the JSON files beside them, as input that may be hostile.

The format (https://github.com/huggingface/safetensors, "Format"): 8 bytes of little-endian header length, that many
bytes of JSON `{name: {dtype, shape, data_offsets: [begin, end]}, "__metadata__": {str: str}}`, then the data, which
the tensors must cover without overlaps or holes.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..errors import CheckpointError
from .dtypes import byte_size

# The safetensors library refuses longer headers, and so does the hub at a quarter of this.
MAX_HEADER = 100_000_000
DOWNLOAD_AGAIN = "download it again, or convert the model anew"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: bytes [begin, end) of `file`, a plain file name in the checkpoint's folder. These are its
    data unless the checkpoint dequantizes it; `nbytes` are those of `dtype` and `shape`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return byte_size(self.dtype, self.shape)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key '{key}' occurs twice in one object")
            seen.add(key)
    return result


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object with no key twice; CheckpointError that begins with `what` otherwise."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not valid JSON ({error}); {DOWNLOAD_AGAIN}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} is not a JSON object but a {type(value).__name__}; {DOWNLOAD_AGAIN}")
    return value


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of the checkpoint (config.json, the index)."""
    try:
        with open(path, "rb") as file:
            size = _require_regular(file.fileno(), path)
            data = file.read(min(size, MAX_HEADER) + 1)  # so much is allocated at once
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > MAX_HEADER:
        raise CheckpointError(f"{path}: longer than {MAX_HEADER} bytes, which no such file is; {DOWNLOAD_AGAIN}")
    return parse_object(data, str(path))


def _require_regular(fd: int, path: Path) -> int:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: not a regular file; put the file itself there")
    return status.st_size


def read_header(path: Path) -> tuple[dict[str, TensorInfo], int]:
    """The tensors of one safetensors file by name, in the order of their data, and the file's size in bytes."""
    try:
        with open(path, "rb") as file:
            size = _require_regular(file.fileno(), path)
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{path}: truncated: {size} bytes cannot hold a header; {DOWNLOAD_AGAIN}")
            length = int.from_bytes(prefix, "little")
            if length > MAX_HEADER:
                raise CheckpointError(
                    f"{path}: header of {length} bytes, more than the {MAX_HEADER} that safetensors allows: damaged, "
                    f"or not a safetensors file; {DOWNLOAD_AGAIN}"
                )
            if 8 + length > size:
                raise CheckpointError(
                    f"{path}: truncated: the header alone has {length} bytes, the file {size}; {DOWNLOAD_AGAIN}"
                )
            data = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) < length:
        raise CheckpointError(f"{path}: became shorter while its header was read; wait until it is complete")
    if not data.startswith(b"{"):
        raise CheckpointError(f"{path}: the header does not start with '{{': not a safetensors file; {DOWNLOAD_AGAIN}")
    header = parse_object(data, f"{path}: header")
    return _tensors(header, path, 8 + length, size), size


def _tensors(header: dict[str, Any], path: Path, data_begin: int, size: int) -> dict[str, TensorInfo]:
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ is not an object of strings; {DOWNLOAD_AGAIN}")
    infos = [_tensor(name, entry, path, data_begin, size) for name, entry in header.items()]
    infos.sort(key=lambda info: (info.begin, info.end))
    position, before = data_begin, "the header"
    for info in infos:
        if info.begin != position:
            fault = "overlaps" if info.begin < position else f"leaves {info.begin - position} unused bytes after"
            raise CheckpointError(f"{path}: tensor '{info.name}' {fault} {before}; {DOWNLOAD_AGAIN}")
        position, before = info.end, f"tensor '{info.name}'"
    if position != size:
        raise CheckpointError(f"{path}: {size - position} bytes after {before} belong to no tensor; {DOWNLOAD_AGAIN}")
    return {info.name: info for info in infos}


def _tensor(name: str, entry: Any, path: Path, data_begin: int, size: int) -> TensorInfo:
    def fail(reason: str) -> NoReturn:
        raise CheckpointError(f"{path}: tensor '{name!s:.200}': {reason}; {DOWNLOAD_AGAIN}")

    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        fail("its header entry is not an object with dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        fail("its dtype is not a string")
    if not isinstance(shape, list):
        fail("its shape is not a list")
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(o) is not int for o in offsets):
        fail("its data_offsets are not two integers")
    begin, end = offsets
    if not 0 <= begin <= end:
        fail(f"its data_offsets {offsets} are not an increasing pair of non-negative numbers")
    if data_begin + end > size:
        fail(f"truncated file: its data end at byte {data_begin + end}, the file at {size}")
    try:
        name.encode()
        expected = byte_size(dtype, shape)
    except UnicodeEncodeError:
        raise CheckpointError(f"{path}: tensor name {name!r} is not valid Unicode; {DOWNLOAD_AGAIN}") from None
    except ValueError as error:
        fail(str(error))
    if end - begin != expected:
        fail(f"{end - begin} bytes of data, but dtype {dtype} and shape {shape} need {expected}")
    return TensorInfo(name, dtype, tuple(shape), path.name, data_begin + begin, data_begin + end)
