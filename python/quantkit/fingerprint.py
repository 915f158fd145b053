"""What a result depends on, as text by key: two runs with the same fingerprint write the same bytes.

Contents of weight files are not read for it, which would take as long as the run. A file's size, its time of change,
its header and a few pages of it stand for it: one that was written anew is noticed, mostly also where its time is kept.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from array import array
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .checkpoint.folder import CONFIG
from .errors import CheckpointError

if TYPE_CHECKING:
    from .checkpoint.reader import Checkpoint

_SAMPLES, _SAMPLE_BYTES = 4, 4096
# Side files up to this size are read as a whole.
_WHOLE = 64 << 20


def source_fingerprint(checkpoint: Checkpoint) -> dict[str, str]:
    """Of the model's files: config.json, weights, and what is carried over beside them."""
    try:
        found = {f"source {CONFIG}": _hash((checkpoint.folder / CONFIG).read_bytes())}
        for name in checkpoint.files:
            found[f"source {name}"] = _weights(checkpoint.folder / name)
        for path in checkpoint.side_files:
            whole = path.stat().st_size <= _WHOLE
            found[f"source {path.name}"] = _hash(path.read_bytes()) if whole else _weights(path, header=False)
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror}") from error
    return found


def data_fingerprint(rows: Sequence[Sequence[int]]) -> dict[str, str]:
    """Of the token rows that are calibrated with, in their order."""
    hashed = hashlib.sha256()
    for row in rows:
        hashed.update(array("q", [len(row), *row]).tobytes())
    text = f"{len(rows)} rows, {sum(map(len, rows))} tokens, sha256 {hashed.hexdigest()[:16]}"
    return {"calibration data": text}


def statistics_fingerprint(folder: Path) -> dict[str, str]:
    """Of statistics that stand in for running the model."""
    try:
        return {f"statistics {p.name}": _weights(p) for p in sorted(folder.iterdir()) if p.is_file()}
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror}") from error


def config_fingerprint(config: Mapping[str, Any]) -> dict[str, str]:
    """Of a resolved configuration: every option by its path in YAML."""
    found: dict[str, str] = {}

    def walk(path: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, entry in value.items():
                walk(f"{path}.{key}" if path else str(key), entry)
        elif isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
            for i, entry in enumerate(value):
                walk(f"{path}[{i}]", entry)
        else:
            found[path] = str(value)

    walk("", dict(config))
    return found


def machine_fingerprint(*, forwards: bool) -> dict[str, str]:
    """Of the software. With `forwards`, results also depend on how PyTorch multiplies matrices; quantkit's own kernels
    give the same bits on every CPU and with any number of threads.
    """
    found = {
        "quantkit": __version__,
        "python": platform.python_version(),
        "torch": version("torch"),  # without importing it: a run without data lets the disk read before it does
        "platform": sys.platform,
    }
    if forwards:
        import torch
        import transformers

        found["transformers"] = transformers.__version__
        found["threads"] = str(torch.get_num_threads())
        found["torch's CPU instructions"] = torch.backends.cpu.get_cpu_capability()
        found["torch's GPU"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return found


def differences(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """`key: old -> new` for every key that is not the same in both."""
    keys = [*old, *(key for key in new if key not in old)]
    return [f"{key}: {old.get(key, 'none')} -> {new.get(key, 'none')}" for key in keys if old.get(key) != new.get(key)]


def _hash(data: bytes) -> str:
    return f"{len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()[:16]}"


def _weights(path: Path, header: bool = True) -> str:
    """Size, time of change, and a hash of the header and of pages at even distances, the last among them."""
    hashed = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        if header:
            length = int.from_bytes(file.read(8), "little")
            hashed.update(os.pread(file.fileno(), min(length, status.st_size), 8))
        last = max(0, status.st_size - _SAMPLE_BYTES)
        for i in range(_SAMPLES):
            hashed.update(os.pread(file.fileno(), _SAMPLE_BYTES, last * (i + 1) // _SAMPLES))
    # To the nanosecond, which datetime does not hold.
    seconds, rest = divmod(status.st_mtime_ns, 1_000_000_000)
    when = datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
    return f"{status.st_size} bytes, sampled sha256 {hashed.hexdigest()[:16]}, changed {when}.{rest:09d}"
