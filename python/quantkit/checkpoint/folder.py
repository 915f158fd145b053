"""Which files of a model folder are used, carried over or left out, and how none of them leads outside it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import CheckpointError

CONFIG = "config.json"
MODEL = "model"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What Ascend's tools call weights, and where they describe them instead of in config.json.
ASCEND = re.compile(r"(quant_model_weights?(?:_\w+)?)\.safetensors(?:\.index\.json)?")
DESCRIPTION = "quant_model_description.json"
# What enters the next layer, in the folder of an output that is being made.
HIDDEN_STATES = ("hidden-states-0", "hidden-states-1")
SHARD = re.compile(r".*-\d+-of-\d+\.safetensors")

# Weights, optimizer states and archives in any format: an output holds its own weights and no others. A
# `consolidated*.safetensors` carried over would make vLLM take the folder for one in Mistral's format.
_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx"),
    *(".onnx_data", ".npz", ".npy", ".ot", ".tflite", ".mlmodel", ".nemo", ".distcp"),
    *(".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst"),
)
_UNFINISHED = (".partial", ".tmp", ".incomplete", ".lock", ".pyc")
_CHECKSUMS = (".md5", ".sha256")


def is_plain_name(name: str) -> bool:
    """Whether `name` can only mean an entry of the folder itself."""
    return name not in ("", ".", "..") and not any(c in name for c in "/\\\0") and name.isprintable()


def checked_file(folder: Path, name: str) -> Path:
    """The path of a regular file in `folder`; CheckpointError if it is missing or a link that leads outside.

    Links within the folder are fine, and so are those of the Hugging Face cache, where
    models--org--name/snapshots/<revision>/file points to models--org--name/blobs/<hash>.
    """
    if not is_plain_name(name):
        raise CheckpointError(f"{folder}: {name!r:.300} is not a plain file name; only files of the folder are read")
    path = folder / name
    if not path.exists():
        # A dangling link tells of a download that was cut short.
        state = "points to a file that does not exist" if path.is_symlink() else "is missing"
        raise CheckpointError(f"{path}: {state}; complete the download")
    if path.is_symlink():
        target, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
        if target.parent != root and target.parent != _hub_blobs(root):
            raise CheckpointError(
                f"{path}: is a symbolic link to {target}, outside the model folder; put the file itself there"
            )
    if not path.is_file():
        raise CheckpointError(f"{path}: not a regular file; put the file itself there")
    return path


def _hub_blobs(root: Path) -> Path | None:
    for parent in root.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            return parent.parent / "blobs"
    return None


def _is_side_file(name: str) -> bool:
    lower = name.lower()
    if lower in (CONFIG, DESCRIPTION) or lower.startswith("readme"):
        return False  # these are written anew for the output
    return not lower.startswith((".", "consolidated")) and not lower.endswith(
        (".index.json", *_WEIGHTS, *_UNFINISHED, *_CHECKSUMS)
    )


def side_files(folder: Path) -> list[Path]:
    """The files that a copy of the model needs beside its weights and config.json: tokenizer, templates, code, license.

    Everything counts that is not known to be something else, because models bring files of any name. Subfolders
    and hidden files do not.
    """
    names = sorted(entry.name for entry in os.scandir(folder) if not entry.is_dir() and _is_side_file(entry.name))
    return [checked_file(folder, name) for name in names]


def stem_of(folder: Path) -> str:
    """What the names of the folder's weight files begin with: `model`, or Ascend's `quant_model_weight...`, where that
    is all there is.
    """
    names = sorted(entry.name for entry in os.scandir(folder))
    found = dict.fromkeys(match[1] for name in names if (match := ASCEND.fullmatch(name)))
    usual = SINGLE in names or INDEX in names
    return next(iter(found)) if len(found) == 1 and not usual else MODEL


def weight_files(folder: Path) -> list[str]:
    """The names of all safetensors files in the folder, whether used or not."""
    return sorted(e.name for e in os.scandir(folder) if e.name.endswith(".safetensors") and not e.name.startswith("."))


def explain_missing_weights(folder: Path) -> str:
    """Why a folder has neither model.safetensors nor an index: what is there instead, and what to do."""
    names = sorted(entry.name for entry in os.scandir(folder))
    consolidated = [n for n in names if n.startswith("consolidated") and n.endswith(".safetensors")]
    pickles = [n for n in names if n.endswith((".bin", ".pt", ".pth")) and "training_args" not in n]
    others = [n for n in names if n.endswith(".safetensors")]
    if consolidated:
        return f"only {consolidated[0]}, which is in Mistral's own format; download the Transformers files of the model"
    if others:
        return (
            f"{others[0]} is neither {SINGLE} nor listed by {INDEX}; complete the download, or rename a single file "
            f"to {SINGLE}"
        )
    if pickles:
        return (
            f"only {pickles[0]}, a pickle, which can run code when it is loaded and is never opened; convert the model "
            "to safetensors (save_pretrained of Transformers does)"
        )
    return f"neither {SINGLE} nor {INDEX}; is this the folder of a model?"
