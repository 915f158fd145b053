"""What the formats that hold one scheme have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..config.schemes import QuantizationArgs, QuantizationScheme
from ..errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from ..checkpoint.layout import OutputTensor
    from ..config.groups import SchemeGroup
    from .cache import CacheShape
    from .folded import Folded


def one_group(name: str, groups: Sequence[SchemeGroup], kv_cache: QuantizationArgs | None) -> QuantizationScheme:
    """The scheme of the only group; ConfigError for more, and for a KV cache."""
    if kv_cache is not None:
        raise refuse_cache(name)
    if len(groups) != 1:
        raise ConfigError(
            f"save_name '{name}' holds one scheme, not {len(groups)} "
            f"({', '.join(group.scheme.name for group in groups) or 'none'}); use save_name 'compressed-tensors'"
        )
    return groups[0].scheme


def weight_only(name: str) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """`pack_activations`, `kv_tensors` and `kv_scales` of a format that has none of these: errors that say so."""

    def pack_activations(
        module: str,
        scale: Tensor,
        zero_point: Tensor | None,
        folded: Folded | None = None,
        args: QuantizationArgs | None = None,
    ) -> dict[str, Tensor]:
        raise ConfigError(f"{module}: save_name '{name}' holds no activation scales")

    def kv_tensors(attention: str, args: QuantizationArgs, shape: CacheShape) -> list[OutputTensor]:
        raise refuse_cache(name)

    def kv_scales(attention: str, k_scale: Tensor, v_scale: Tensor, shape: CacheShape) -> dict[str, Tensor]:
        raise refuse_cache(name)

    return pack_activations, kv_tensors, kv_scales


def no_cache(block: Mapping[str, Any]) -> QuantizationArgs | None:
    """Of a format that says nothing of the KV cache."""
    return None


def refuse_cache(name: str) -> ConfigError:
    return ConfigError(f"save_name '{name}' has no place for KV-cache scales; use save_name 'compressed-tensors'")


def require_key(block: Mapping[str, Any], *names: str) -> Any:
    """The first of `names` that is there."""
    for name in names:
        if block.get(name) is not None:
            return block[name]
    raise CheckpointError(f"quantization_config: no {' or '.join(names)}, without which its weights cannot be read")


def fp16_scales(scheme: QuantizationScheme) -> str:
    """The last name of the tensor with a weight's scales, in GPTQ's and AWQ's formats."""
    return "scales"


def fp16(scheme: QuantizationScheme, model_dtype: str) -> str:
    """The dtype of these whatever the model's: readers hold them in it."""
    return "F16"


def with_qweight(tensors: Iterable[str]) -> list[str]:
    """The modules of a checkpoint in these formats that carry codes."""
    return suffixed(tensors, "qweight")


def suffixed(tensors: Iterable[str], part: str) -> list[str]:
    """The modules that have a tensor `part`."""
    return [name.removesuffix(f".{part}") for name in tensors if name.endswith(f".{part}")]
