"""C8, the KV cache in int8 of Ascend's format: `<attention>.k_proj.kv_cache_scale` and `kv_cache_offset`, and those of
v_proj, in the model's dtype, a number for each of the channels of all heads.

The NPU caches q = round(k * (1 / scale) + offset) after RoPE, all in the model's dtype, and reads (q - offset) * scale.
vLLM-Ascend looks at the offset as it writes, and not in most of the ways that it reads, so that quantkit writes zeros.
Source: MindIE-LLM's documentation of KV Cache int8, msModelSlim's of its output (6.12 C8), vLLM-Ascend's attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..checkpoint.layout import OutputTensor
from ..config.schemes import QuantizationArgs
from ..errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .cache import CacheShape

KIND = "C8"  # in the description, of each tensor and of the model's cache
KEYS = ("kv_quant_type", "kv_cache_type")  # MindIE and vLLM-Ascend look for one of them each
CACHE = ("k_proj.kv_cache_scale", "v_proj.kv_cache_scale", "k_proj.kv_cache_offset", "v_proj.kv_cache_offset")
CANDIDATES = 4  # numbers from a scale upwards that are tried: at most 1.6 % of the range in bf16


def kv_tensors(attention: str, args: QuantizationArgs, shape: CacheShape) -> list[OutputTensor]:
    """What `attention`'s scales become. ConfigError for a cache in FP8, for a model in fp32, and for an attention whose
    keys and values are not made by k_proj and v_proj, after which the tensors are named.
    """
    if args.type != "int":
        raise ConfigError("save_name 'mindie': a KV cache is in int8 there, not FP8; use kv_cache_scheme int8")
    if not (shape.keys and shape.values):
        raise ConfigError(
            f"{attention}: has no k_proj and v_proj, after which save_name 'mindie' names the scales of a KV cache; "
            "leave kv_cache_scheme out"
        )
    if shape.dtype not in ("BF16", "F16"):
        raise ConfigError(
            f"{attention}: its k_proj is {shape.dtype}; save_name 'mindie' has a KV cache in int8 for models in "
            "bfloat16 and float16"
        )
    widths = (shape.keys, shape.values) * 2
    return [
        OutputTensor(f"{attention}.{part}", shape.dtype, (width,)) for part, width in zip(CACHE, widths, strict=True)
    ]


def kv_scales(attention: str, k_scale: Tensor, v_scale: Tensor, shape: CacheShape) -> dict[str, Tensor]:
    """The tensors of `kv_tensors`, from fp32 scales [1], [heads] or [channels], each repeated for its channels."""
    import torch

    from ..checkpoint.dtypes import torch_dtype

    dtype = torch_dtype(str(shape.dtype))
    made = []
    for scale, width in ((k_scale, shape.keys), (v_scale, shape.values)):
        made.append(snapped(scale.reshape(-1).repeat_interleave(width // scale.numel()), dtype))
    made += [torch.zeros_like(scale) for scale in made]
    return {f"{attention}.{part}": tensor for part, tensor in zip(CACHE, made, strict=True)}


def snapped(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """For each of fp32 `scale` [n] the number of `dtype`, among the CANDIDATES from it upwards, whose inverse in
    `dtype` is nearest to its own; never less than `scale`, so that the range stays covered.
    """
    import torch

    bits = scale.to(dtype)
    above = torch.full_like(bits, torch.inf)
    bits = torch.where(bits.float() < scale, torch.nextafter(bits, above), bits)
    candidates = [bits]
    while len(candidates) < CANDIDATES:
        candidates.append(torch.nextafter(candidates[-1], above))
    every = torch.stack(candidates)
    mismatch = ((1 / every.float()).to(dtype).double() * every.double() - 1).abs()
    return every.gather(0, mismatch.argmin(0, keepdim=True))[0]


def emulate(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Keys or values x [rows, heads, tokens, head size] as the NPU reads them from its cache, in x's dtype. `scale` and
    `offset`, in the model's dtype, are the stored ones; the arithmetic is in it.
    """
    import torch

    heads, size = x.shape[1], x.shape[3]
    scale, offset = (
        t.to(x.device).reshape(-1).expand(heads * size).reshape(heads, 1, size) for t in (scale, offset.to(scale.dtype))
    )
    codes = torch.round(x.to(scale.dtype) * (1 / scale) + offset).clamp(-128, 127)
    return ((codes - offset) * scale).to(x.dtype)
