"""A model given as a folder or as a Hugging Face hub id, as a folder."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import CheckpointError, nearest

# Everything a quantized copy may need but weights in other formats, which can be as large again.
_IGNORED = [
    "*.bin",
    "*.bin.index.json",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.gguf",
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "*.onnx_data",
    "*.pkl",
    "*.tflite",
    "*.ot",
    "consolidated*",
    "*/*",  # subfolders: original/, onnx/, images
]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)


def resolve_model(path_or_id: str | Path, cache_dir: str | Path | None = None, revision: str | None = None) -> Path:
    """The folder of a model: `path_or_id` itself where it is one, else the hub's snapshot, downloaded if need be.

    With HF_HUB_OFFLINE=1, or without a network, the local cache is used. `cache_dir` and `revision` (branch, tag or
    commit) are for hub ids; a revision with a folder is an error, because it would not be honoured.
    """
    text = os.fspath(path_or_id)
    if not text:
        raise CheckpointError("no model given; give the folder of a model, or a hub id (org/name)")
    path = Path(text).expanduser()
    if path.is_dir():
        if revision is not None:
            raise CheckpointError(f"{path}: is a folder, which has no revision '{revision}'; leave the revision out")
        return path
    if path.exists():
        raise CheckpointError(f"{path}: is a file; give the folder that holds config.json")
    if isinstance(path_or_id, Path) or not _is_hub_id(text):
        raise CheckpointError(
            f"{path}: no such folder{_similar(path)}; give the folder of a model, or a hub id (org/name)"
        )
    return _snapshot(text, path, cache_dir, revision)


def _is_hub_id(text: str) -> bool:
    return bool(_HUB_ID.fullmatch(text)) and ".." not in text and "--" not in text


def _similar(path: Path) -> str:
    """A did-you-mean for the first part of `path` that does not exist."""
    for parent in reversed([path, *path.parents]):
        if not parent.exists():
            try:
                siblings = [entry.name for entry in os.scandir(parent.parent) if entry.is_dir()]
            except OSError:
                return f" ({parent.parent} cannot be listed)"
            return nearest(parent.name, siblings)
    return ""


def _snapshot(repo: str, path: Path, cache_dir: str | Path | None, revision: str | None) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    named = f"'{repo}'" + (f" at revision '{revision}'" if revision else "")
    local = f"no folder {path}{_similar(path)}"
    try:
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                cache_dir=cache_dir,
                ignore_patterns=_IGNORED,
                # Offline mode alone does not keep the library from asking the hub about a commit.
                local_files_only=constants.HF_HUB_OFFLINE,
            )
        )
    except errors.GatedRepoError as error:  # a subclass of RepositoryNotFoundError, hence first
        raise CheckpointError(
            f"{named}: the hub gives access only to who accepted its terms; accept them on the model's page, then "
            "`hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{named}: the hub has the model but not this revision; check model.revision") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{named}: {local}, and the hub has no such model, or it is private; check the name, or `hf auth login`"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        cache = cache_dir or constants.HF_HUB_CACHE
        raise CheckpointError(
            f"{named}: {local}; {offline}, and {cache} does not hold the complete model; connect, download it once, or "
            "give a folder"
        ) from error
    except errors.HFValidationError as error:
        raise CheckpointError(f"{named}: {local}, and not a valid hub id either: {error}") from error
    # HTTPError is that of the HTTP library in use, which differs between releases of huggingface_hub.
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined,unused-ignore]
        raise CheckpointError(f"{named}: {local}; the download failed: {error}") from error
