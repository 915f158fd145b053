"""A checkpoint in FP8 by blocks (DeepSeek V3 and R1, Qwen's -FP8) as a source: read as if it were the plain one.

Such a checkpoint has, beside a weight `x` of dtype F8_E4M3 [out, in] (or [experts, out, in]), its scales
`x_scale_inv` [ceil(out / rows), ceil(in / columns)], multiplied by in spite of the name. Here the scales are gone, and
`x` has the model's own dtype: code * scale in fp32, rounded once, which is what DeepSeek's own fp8_cast_bf16.py gives.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.dtypes import torch_dtype
from ..checkpoint.folder import CONFIG
from ..checkpoint.header import read_object
from ..checkpoint.native import host
from ..checkpoint.reader import Checkpoint, TensorInfo, member_of
from ..errors import CheckpointError
from . import fp8, mxfp4_source
from .stacked_source import split

if TYPE_CHECKING:
    import torch

    from .._host import Weight

SUFFIX = "_scale_inv"
CODES, SCALES = "F8_E4M3", ("F32", "BF16", "F16", "F8_E8M0")
# The scales of an 8-bit KV cache, which a plain checkpoint has not.
CACHE = (".k_scale", ".v_scale")


def open_source(folder: Path | str) -> Checkpoint:
    """The checkpoint in `folder` to start from: as it is, or dequantized as it is read if it is FP8 in blocks or
    has experts in MXFP4. Other
    quantized ones are given as they are; the plan refuses them. Experts stored as one tensor have each its own.
    """
    folder = Path(folder)
    block = read_object(folder / CONFIG).get("quantization_config") if (folder / CONFIG).is_file() else None
    if isinstance(block, Mapping) and block.get("quant_method") == fp8.NAME and block.get("weight_block_size"):
        return split(Fp8Source(folder))
    if isinstance(block, Mapping) and block.get("quant_method") == mxfp4_source.NAME:
        return split(mxfp4_source.Mxfp4Source(folder))
    return split(Checkpoint(folder))


class Fp8Source(Checkpoint):
    """The plain checkpoint behind one in FP8 by blocks. `config` is without its `quantization_config`. CheckpointError
    where weights, scales and config.json contradict each other.
    """

    def __init__(self, folder: Path | str) -> None:
        super().__init__(folder)
        block = self.config["quantization_config"]
        weights = fp8.read_schemes(block)("").weights
        assert weights.block_structure is not None
        self._block = list(weights.block_structure)
        if block.get("fmt") not in (None, "e4m3"):
            raise CheckpointError(f"{self.folder}: quantization_config: fmt is {block['fmt']!r}; read is e4m3")
        self._stored = self.tensors
        self._scales = {name.removesuffix(SUFFIX): info for name, info in self.tensors.items() if name.endswith(SUFFIX)}
        self._check(block.get("modules_to_not_convert") or ())
        plain = self.model_dtype or "BF16"
        gone = {info.name for info in self._scales.values()}
        if block.get("kv_cache_scheme"):
            gone |= {name for name in self.tensors if name.endswith(CACHE)}
        self.tensors = {
            name: replace(info, dtype=plain) if name in self._scales else info
            for name, info in self._stored.items()
            if name not in gone
        }
        self.parts = self.tensors
        self.dequantized = self.remade = frozenset(self._scales)
        self.total_bytes = sum(info.nbytes for info in self.tensors.values())
        self.config = {key: value for key, value in self.config.items() if key != "quantization_config"}

    def _check(self, kept: Any) -> None:
        """Every code has scales of the right shape, every scale its codes, and nothing that config.json says to be in
        full precision is in FP8.
        """
        if not isinstance(kept, Iterable) or isinstance(kept, str):
            raise CheckpointError(f"{self.folder}: quantization_config: modules_to_not_convert is no list of names")
        kept = {str(name) for name in kept}
        if not self._scales:
            raise CheckpointError(
                f"{self.folder}: config.json says FP8 in blocks, and no weight has scales (*{SUFFIX}); "
                "take quantization_config out if the weights are in full precision"
            )
        for name, info in self._stored.items():
            if info.dtype.startswith("F8_") and name not in self._scales and not name.endswith(SUFFIX):
                raise CheckpointError(f"{self.folder}: {name} is {info.dtype}, and there is no {name}{SUFFIX}")
        for name, scale in self._scales.items():
            codes = self._stored.get(name)
            if codes is None:
                raise CheckpointError(f"{self.folder}: {scale.name}: there is no {name} that it is the scale of")
            self._check_pair(codes, scale)
            parts = name.removesuffix(".weight").split(".")
            said = kept and next((p for i in range(len(parts)) if (p := ".".join(parts[: i + 1])) in kept), None)
            if said:
                raise CheckpointError(
                    f"{self.folder}: {name} is in FP8, and modules_to_not_convert of config.json has '{said}', "
                    "which says that it is not; correct one of them"
                )

    def _check_pair(self, codes: TensorInfo, scale: TensorInfo) -> None:
        if codes.dtype != CODES or len(codes.shape) not in (2, 3):
            raise CheckpointError(
                f"{self.folder}: {codes.name} is {codes.dtype} {list(codes.shape)}; with {scale.name} beside it, it "
                f"has to be {CODES} in two or three dimensions"
            )
        *experts, rows, cols = codes.shape
        grid = (*experts, -(-rows // self._block[0]), -(-cols // self._block[1]))
        if scale.dtype not in SCALES or scale.shape != grid:
            raise CheckpointError(
                f"{self.folder}: {scale.name} is {scale.dtype} {list(scale.shape)}; the scales of {list(codes.shape)} "
                f"in blocks of {self._block[0]} x {self._block[1]} are F32 {list(grid)}"
            )

    def tensor(self, name: str, populate: bool = True) -> torch.Tensor:
        """Tensor `name`: a view on the file as in `Checkpoint`, or made anew if it is in FP8. CheckpointError if its
        scales have NaN or Inf.
        """
        scale = self._scales.get(name)
        if scale is None:
            return super().tensor(name, populate)
        return self._dequantized(name, self._tensor(self._stored[name], True), self._tensor(scale, True))

    def member(self, name: str, index: int, populate: bool = True) -> torch.Tensor:
        """See `Checkpoint`."""
        scale = self._scales.get(name)
        if scale is None:
            return super().member(name, index, populate)
        codes = self._tensor(member_of(self._stored[name], index), True)
        return self._dequantized(name, codes, self._tensor(member_of(scale, index), True))

    def stored_weight(self, name: str) -> Weight:
        """As in `Checkpoint`, also of one in FP8. CheckpointError if its scales have NaN or Inf."""
        scale = self._scales.get(name)
        if scale is None:
            return super().stored_weight(name)
        with self._reading(scale):
            scales = host().Scales(self.mapped(scale.file), scale.begin, scale.dtype, *scale.shape)
        if not scales.finite:
            raise self._damaged(name)
        codes = self._stored[name]
        made: Weight = host().Weight(
            self.mapped(codes.file), codes.begin, self.tensors[name].dtype, *codes.shape, scales, self._block
        )
        return made

    def _damaged(self, name: str) -> CheckpointError:
        return CheckpointError(
            f"{self.folder}: {self._scales[name].name} has NaN or Inf; the checkpoint is damaged, download it again"
        )

    def _dequantized(self, name: str, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        import torch

        from .. import ops

        scales = scales.to(torch.float32)
        if not bool(torch.isfinite(scales).all()):
            raise self._damaged(name)
        dtype = torch_dtype(self.tensors[name].dtype)
        if codes.dim() == 2:
            return ops.dequantize(codes, scales, None, self._block, dtype)
        experts = torch.empty(codes.shape, dtype=dtype)
        for out, matrix, grid in zip(experts, codes, scales, strict=True):
            out.copy_(ops.dequantize(matrix, grid, None, self._block, dtype))
        return experts

    def prefetch(self, name: str) -> None:
        """As in `Checkpoint`, codes and scales."""
        for info in self._parts(name):
            self._prefetch(info)

    def release(self, name: str) -> None:
        """As in `Checkpoint`. What `tensor` made of codes goes with its last user."""
        for info in self._parts(name):
            self._release(info)

    def _parts(self, name: str) -> list[TensorInfo]:
        scale = self._scales.get(name)
        return [self.info(name)] if scale is None else [self._stored[name], scale]
