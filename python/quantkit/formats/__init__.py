"""Checkpoint formats: each a module with the same functions (`Format`), found by its `quant_method`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import CheckpointError, ConfigError, nearest
from . import awq, bitsandbytes, compressed_tensors, fp8, gptq, mindie

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..checkpoint.layout import OutputTensor
    from ..config.groups import SchemeGroup
    from ..config.schemes import QuantizationArgs, QuantizationScheme
    from ..quantized import QuantizedTensor
    from .cache import CacheShape
    from .compressed_tensors import Schemes
    from .folded import Folded
    from .rows import RowTensors


class Format(Protocol):
    """What a format module offers. A new format is one new file and one line in FORMATS. `PARTS`: the last names of the
    tensors that a quantized Linear may have, its bias aside. `IN_CONFIG`: the key of config.json that has its block, or
    the kind alone where another file tells the rest. `FOLDS`: whether the scales of a static input take in the weight
    and the bias. `ZERO_POINT`: its zero point's last name.
    `CACHE`: what an attention module with an 8-bit cache has: the scales of keys and values, and whatever else.
    `row_tensors`: for a weight that is rounded to nearest by ranges, where its rows are rows of tensors.
    """

    NAME: str
    VERSION: str
    PARTS: tuple[str, ...]
    IN_CONFIG: str
    FOLDS: bool
    ZERO_POINT: str
    CACHE: tuple[str, ...]

    def check(self, scheme: QuantizationScheme) -> None: ...
    def packs(self, scheme: QuantizationScheme) -> bool: ...
    def scale_name(self, scheme: QuantizationScheme) -> str: ...
    def scale_dtype(self, scheme: QuantizationScheme, model_dtype: str) -> str: ...
    def stored_tensors(
        self, module: str, scheme: QuantizationScheme, rows: int, cols: int, model_dtype: str
    ) -> list[OutputTensor]: ...
    def row_tensors(self, module: str, scheme: QuantizationScheme, rows: int, cols: int) -> RowTensors | None: ...
    def pack_weight(self, module: str, quantized: QuantizedTensor, scale_dtype: torch.dtype) -> dict[str, Tensor]: ...
    def pack_activations(
        self,
        module: str,
        scale: Tensor,
        zero_point: Tensor | None,
        folded: Folded | None = None,
        args: QuantizationArgs | None = None,
    ) -> dict[str, Tensor]: ...
    def kv_tensors(self, attention: str, args: QuantizationArgs, shape: CacheShape) -> list[OutputTensor]: ...
    def kv_scales(self, attention: str, k_scale: Tensor, v_scale: Tensor, shape: CacheShape) -> dict[str, Tensor]: ...
    def config_block(
        self,
        groups: Sequence[SchemeGroup],
        ignore: Sequence[str],
        user_ignore: Sequence[str],
        kv_cache: QuantizationArgs | None = None,
    ) -> dict[str, Any]: ...
    def side_files(
        self, block: Mapping[str, Any], tensors: Iterable[str], schemes: Mapping[str, QuantizationScheme]
    ) -> dict[str, bytes]: ...
    def stem(self, schemes: Iterable[QuantizationScheme]) -> str: ...
    def read_schemes(self, block: Mapping[str, Any]) -> Schemes: ...
    def read_kv_cache(self, block: Mapping[str, Any]) -> QuantizationArgs | None: ...
    def quantized_modules(self, tensors: Iterable[str]) -> list[str]: ...
    def shape(self, module: str, scheme: QuantizationScheme, get: Any) -> tuple[int, int]: ...
    def load_scale(self, module: str, scheme: QuantizationScheme, get: Any) -> Tensor: ...
    def load_zero_point(self, module: str, scheme: QuantizationScheme, get: Any, rows: int) -> Tensor | None: ...
    def load_weight(
        self, module: str, scheme: QuantizationScheme, get: Any, rows: int, cols: int
    ) -> QuantizedTensor: ...


FORMATS: dict[str, Format] = {f.NAME: f for f in (compressed_tensors, gptq, awq, fp8, mindie, bitsandbytes)}


def format_by_name(name: str) -> Format:
    """The format that `quantization.save_name` asks for."""
    if name not in FORMATS:
        raise ConfigError(f"save_name: unknown format '{name}'{nearest(name, FORMATS)}; known: {', '.join(FORMATS)}")
    return FORMATS[name]


def written_config(fmt: Format, config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` as config.json has it. Where another file has the block, the key `IN_CONFIG` has its kind, as Ascend's
    scripts write it, and the model's dtype has the name that older readers know, too.
    """
    if fmt.IN_CONFIG == "quantization_config":
        return dict(config)
    written = {key: value for key, value in config.items() if key != "quantization_config"}
    if "dtype" in written:
        written["torch_dtype"] = written["dtype"]
    return written | {fmt.IN_CONFIG: str(config["quantization_config"]["model_quant_type"]).lower()}


def format_of_checkpoint(config: Mapping[str, Any]) -> Format | None:
    """The format a config.json declares, None for one without `quantization_config`."""
    block = config.get("quantization_config")
    if block is None:
        return None
    method = block.get("quant_method")
    if not isinstance(method, str) or method not in FORMATS:
        raise CheckpointError(
            f"config.json: quant_method '{method}' is not one that quantkit reads ({', '.join(FORMATS)})"
        )
    return FORMATS[method]
