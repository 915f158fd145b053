"""Queries in compressed-tensors' format: `<attention>.q_scale` fp32 [1], or [heads, 1, 1] per head, beside those of
keys and values, and a config group without weights whose target is the class of the attention. It always goes with a
`kv_cache_scheme` of the same arguments, which servers read instead of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..checkpoint.layout import OutputTensor
from ..config.schemes import QuantizationArgs
from .compressed_tensors import entry

if TYPE_CHECKING:
    from torch import Tensor

QUERY = "q_scale"
# Outside of these no scale was ever calibrated: llm-compressor stores what it finds in memory.
LEAST, MOST = 1e-12, 1e4


def calibrated(scale: Tensor) -> bool:
    """Whether all of a stored scale may be."""
    value = scale.float()
    return bool((value.isfinite() & (value > LEAST) & (value < MOST)).all())


def query_tensor(attention: str, args: QuantizationArgs, heads: int) -> OutputTensor:
    """What the scale of the queries of `attention` becomes on disk."""
    return OutputTensor(f"{attention}.{QUERY}", "F32", (heads, 1, 1) if args.strategy == "attn_head" else (1,))


def query_scale(attention: str, scale: Tensor) -> dict[str, Tensor]:
    """The tensor of `query_tensor`; `scale` is fp32 [1], or [heads] per head."""
    return {f"{attention}.{QUERY}": scale.reshape(1) if scale.numel() == 1 else scale.reshape(-1, 1, 1)}


def with_attention(block: Mapping[str, Any], targets: Sequence[str], args: QuantizationArgs) -> dict[str, Any]:
    """`block`, a `quantization_config` with `kv_cache_scheme`, and a group for attention of the classes `targets`."""
    groups = dict(block["config_groups"])
    groups[f"group_{len(groups)}"] = {
        "format": "dense",
        "input_activations": entry(args),
        "output_activations": None,
        "targets": list(targets),
        "weights": None,
    }
    return {**block, "config_groups": groups}
