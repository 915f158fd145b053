"""A paged cache of keys and values in the words of vLLM."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit import ops

from ._define import alias, check, matrix, one

_FP8_NAMES = ("fp8", "fp8_e4m3")


def _write(cache: Tensor, new: Tensor, slots: Tensor) -> None:
    """cache[slot] = new, but for slots below zero; without asking the device how many there are."""
    if not slots.numel():
        return
    blocks, size = cache.shape[:2]
    # A row that is not wanted writes what a wanted one does, or, if there is none, what is there already.
    first = torch.argmax((slots >= 0).to(torch.int8))
    source = torch.where(slots >= 0, torch.arange(len(slots), device=slots.device), first)
    slots, new = slots[source], new[source]
    place = slots.clamp(0, blocks * size - 1)
    block, offset = place // size, place % size
    cache[block, offset] = torch.where((slots >= 0).view(-1, 1, 1), new, cache[block, offset])


@alias(
    "vllm",
    "reshape_and_cache_flash(Tensor key, Tensor value, Tensor! key_cache, Tensor! value_cache, Tensor slot_mapping, "
    "str kv_cache_dtype, Tensor k_scale, Tensor v_scale) -> ()",
)
def reshape_and_cache_flash(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str,
    k_scale: Tensor,
    v_scale: Tensor,
) -> None:
    """key, value [T, heads, size] into caches [blocks, block size, heads, size]; slots below zero are left out."""
    op, count = "reshape_and_cache_flash", len(slot_mapping)
    check(op, kv_cache_dtype in ("auto", *_FP8_NAMES), lambda: f"kv_cache_dtype {kv_cache_dtype!r} is not offered")
    for new, cache, scale in ((key, key_cache, k_scale), (value, value_cache, v_scale)):
        rows = new[:count]  # padded for graphs
        if kv_cache_dtype == "auto":
            _write(cache, rows.to(cache.dtype), slot_mapping)
            continue
        check(op, scale.numel() == 1, lambda scale=scale: f"scales must be one number, got {list(scale.shape)}")  # type: ignore[misc]
        flat = rows.flatten(1)
        codes = ops.quantize_fp8(flat, one(scale, flat), [-1, -1]).view(torch.uint8)
        _write(cache.view(torch.uint8), codes.view(rows.shape), slot_mapping)


@alias("vllm", "convert_fp8(Tensor! dst_cache, Tensor src_cache, float scale, str kv_cache_dtype) -> ()")
def convert_fp8(dst_cache: Tensor, src_cache: Tensor, scale: float, kv_cache_dtype: str) -> None:
    """To FP8 (bytes) by 1 / scale, or from it by scale."""
    op = "convert_fp8"
    check(op, kv_cache_dtype in ("auto", *_FP8_NAMES), lambda: f"kv_cache_dtype {kv_cache_dtype!r} is not offered")
    source = matrix(src_cache)
    step = torch.full((1, 1), scale, device=src_cache.device)[: len(source)]
    if src_cache.dtype in (torch.uint8, torch.float8_e4m3fn):
        codes = source.view(torch.float8_e4m3fn)
        dst_cache.copy_(ops.dequantize(codes, step, None, [-1, -1], dst_cache.dtype).view(dst_cache.shape))
    else:
        made = ops.quantize_fp8(source, step, [-1, -1])
        dst_cache.view(torch.uint8).copy_(made.view(torch.uint8).view(dst_cache.shape))
