"""`state_dict` and `save_pretrained` of a loaded model give back what the checkpoint holds, not a kernel's layout."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checkpoint.reader import Checkpoint
from ..errors import CheckpointError, ConfigError
from ..formats import format_of_checkpoint
from ..formats.stacked_source import split
from .experts import ExpertLinears, QuantExperts
from .linear import QuantLinear

if TYPE_CHECKING:
    from ..models.skeleton import Skeleton


class Stored:
    """The checkpoint in `folder`, opened again when somebody asks for its tensors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def tensors(self, module: str) -> dict[str, Tensor]:
        """The tensors of quantized `module` by the last part of their names, in memory of their own."""
        with Checkpoint(self.folder) as checkpoint:
            stored = format_of_checkpoint(checkpoint.config)
            parts = stored.PARTS if stored is not None else ()
            names = {part: f"{module}.{part}" for part in (*parts, "bias")}
            return {part: checkpoint.tensor(n).clone() for part, n in names.items() if n in checkpoint.tensors}


class Saver:
    """`save_pretrained` of a model that `load` made: a copy of its checkpoint."""

    def __init__(self, model: Any, skeleton: Skeleton, stored: Stored) -> None:
        self.model, self.skeleton, self.stored = model, skeleton, stored

    def __deepcopy__(self, memo: dict[int, Any]) -> Saver:
        return self

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Copy the checkpoint that the model was loaded from to folder `save_directory`, which must be new or empty.

        Raises ConfigError for options, which would change what is written, and CheckpointError if the model is no
        longer what was loaded (Linears swapped, parameters changed): no file could say so.
        """
        wanted = {name: value for name, value in options.items() if value not in (None, False)}
        wanted.pop("safe_serialization", None)
        if wanted:
            raise ConfigError(
                f"save_pretrained: {next(iter(wanted))}: a loaded model is saved as a copy of {self.stored.folder}; "
                "leave options out"
            )
        target = Path(save_directory)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise CheckpointError(f"{target}: is there already; give a new or empty folder")
        with split(Checkpoint(self.stored.folder)) as checkpoint:
            self._require_unchanged(checkpoint)
            target.mkdir(parents=True, exist_ok=True)
            for path in checkpoint.side_files:
                shutil.copyfile(path, target / path.name)
            names = [*checkpoint.files, "model.safetensors.index.json", "generation_config.json", "config.json"]
            for name in dict.fromkeys(names):
                if (self.stored.folder / name).exists():
                    shutil.copyfile(self.stored.folder / name, target / name)

    def _require_unchanged(self, checkpoint: Checkpoint) -> None:
        for path, module in self.model.named_modules():
            if isinstance(module, QuantExperts | ExpertLinears):
                continue
            if isinstance(module, QuantLinear):
                if module.stored is None and not path.endswith(".whole"):
                    raise CheckpointError(
                        f"save_pretrained: {path} was quantized after the model was loaded, and packed weights "
                        "cannot be written; quantize the original model with quantkit.oneshot, whose model saves "
                        "itself"
                    )
                continue
            for key, tensor in module._parameters.items():
                name = self.skeleton.checkpoint_name(f"{path}.{key}")
                if tensor is None or name not in checkpoint.tensors:
                    continue
                there = checkpoint.tensor(name)
                same = there.shape == tensor.shape and torch.equal(there.to(tensor.dtype), tensor)
                checkpoint.release(name)
                if not same:
                    raise CheckpointError(
                        f"save_pretrained: {name} is not what was loaded from {self.stored.folder}; change the "
                        "original model, and quantize it again"
                    )
