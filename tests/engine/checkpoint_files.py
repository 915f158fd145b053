"""Model folders for the checkpoint tests, written byte by byte without quantkit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of any header, true or not; a header of bytes is taken as it is."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: str, shape: list[Any], begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def header_of(names: list[str]) -> tuple[dict[str, Any], bytes]:
    """One F32 [2] tensor for each name, and their bytes."""
    header = {name: entry("F32", [2], 8 * i, 8 * i + 8) for i, name in enumerate(names)}
    return header, b"".join(bytes([i % 255 + 1]) * 8 for i in range(len(names)))


def single(folder: Path, content: bytes | None = None, config: bytes = b'{"model_type": "llama"}') -> Path:
    """A folder with config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_bytes(config)
    (folder / "model.safetensors").write_bytes(raw(*header_of(["a", "b"])) if content is None else content)
    return folder


def sharded(folder: Path, shards: Mapping[str, list[str]], weight_map: Mapping[str, Any] | None = None) -> Path:
    """A folder of several shards; the true index unless `weight_map` gives another."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    for file, names in shards.items():
        (folder / file).write_bytes(raw(*header_of(names)))
    if weight_map is None:
        weight_map = {name: file for file, names in shards.items() for name in names}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return folder
