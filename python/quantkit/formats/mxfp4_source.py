"""A checkpoint whose experts are in MXFP4, as gpt-oss is published, as a source: read as if it were the plain one.

Instead of `x` [experts, in, out] such a checkpoint has `x_blocks` U8 [experts, out, in / 32, 16], two e2m1 codes a
byte, the first in the low half, and `x_scales` U8 [experts, out, in / 32], exponents of two above -127. Here `x` has
the model's own dtype, in which every product is exact unless it leaves the dtype's range.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint.dtypes import torch_dtype
from ..checkpoint.reader import Checkpoint, TensorInfo, member_of
from ..errors import CheckpointError

if TYPE_CHECKING:
    import torch

NAME, BLOCKS, SCALES = "mxfp4", "_blocks", "_scales"
GROUP, BIAS = 32, 127
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class Mxfp4Source(Checkpoint):
    """The plain checkpoint behind one with experts in MXFP4. `config` is without its `quantization_config`.
    CheckpointError where codes and scales do not fit together.
    """

    def __init__(self, folder: Path | str) -> None:
        super().__init__(folder)
        stored, plain = self.tensors, self.model_dtype or "BF16"
        self._codes: dict[str, tuple[TensorInfo, TensorInfo]] = {}
        self.tensors = {}
        for name, info in stored.items():
            base = name.removesuffix(BLOCKS)
            if base != name:
                self._codes[base] = info, self._scales_of(base, info, stored)
                count, rows, groups, _ = info.shape
                self.tensors[base] = replace(info, name=base, dtype=plain, shape=(count, groups * GROUP, rows))
            elif not (name.endswith(SCALES) and f"{name.removesuffix(SCALES)}{BLOCKS}" in stored):
                self.tensors[name] = info
        if not self._codes:
            raise CheckpointError(
                f"{self.folder}: config.json says {NAME}, and no weight is stored so (*{BLOCKS}); "
                "take quantization_config out if the weights are in full precision"
            )
        self.parts = self.tensors
        self.dequantized = self.remade = frozenset(self._codes)
        self.total_bytes = sum(info.nbytes for info in self.tensors.values())
        self.config = {key: value for key, value in self.config.items() if key != "quantization_config"}

    def _scales_of(self, base: str, blocks: TensorInfo, stored: dict[str, TensorInfo]) -> TensorInfo:
        scales = stored.get(f"{base}{SCALES}")
        fits = blocks.dtype == "U8" and len(blocks.shape) == 4 and blocks.shape[3] == GROUP // 2 and blocks.shape[0] > 0
        if base in stored or not fits or scales is None or (scales.dtype, scales.shape) != ("U8", blocks.shape[:3]):
            found = "missing" if scales is None else f"{scales.dtype} {list(scales.shape)}"
            raise CheckpointError(
                f"{self.folder}: {blocks.name} is {blocks.dtype} {list(blocks.shape)}, and {base}{SCALES} is {found}; "
                f"experts in {NAME} are U8 [experts, out, in / 32, 16] with scales U8 [experts, out, in / 32]"
            )
        return scales

    def tensor(self, name: str, populate: bool = True) -> torch.Tensor:
        """Tensor `name`: a view on the file as in `Checkpoint`, or made anew if it is in MXFP4."""
        if name not in self._codes:
            return super().tensor(name, populate)
        import torch

        return torch.stack([self.member(name, index) for index in range(self.info(name).shape[0])])

    def member(self, name: str, index: int, populate: bool = True) -> torch.Tensor:
        """See `Checkpoint`. CheckpointError if its scales have the code of NaN."""
        if name not in self._codes:
            return super().member(name, index, populate)
        import torch

        blocks, scales = (self._tensor(member_of(info, index), True) for info in self._codes[name])
        if bool((scales == 255).any()):
            raise CheckpointError(
                f"{self.folder}: {name}{SCALES} has NaN; the checkpoint is damaged, download it again"
            )
        values = torch.tensor([*VALUES, *(-value for value in VALUES)])
        codes = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2)
        exact = torch.ldexp(values[codes.long()], scales.to(torch.int32).sub(BIAS).unsqueeze(-1))
        # A matrix as Transformers multiplies by it, [in, out].
        return exact.flatten(1).to(torch_dtype(self.tensors[name].dtype)).t()

    def prefetch(self, name: str) -> None:
        """As in `Checkpoint`, codes and scales."""
        for info in self._codes.get(name) or (self.info(name),):
            self._prefetch(info)

    def release(self, name: str) -> None:
        """As in `Checkpoint`. What `tensor` made of codes goes with its last user."""
        for info in self._codes.get(name) or (self.info(name),):
            self._release(info)
