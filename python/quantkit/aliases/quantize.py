"""Activations to int8, FP8 and NVFP4 in the words of vLLM and sgl-kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantkit import ops
from quantkit.ops.quantize import FP8_MAX

from ._define import alias, check, matrix, one, store

_LEAST_TOKEN_SCALE = 1.0 / (448.0 * 512.0)  # of a token's FP8 scale, in vLLM and sgl-kernel


def _quantized(op: str, x: Tensor, scale: Tensor, block: Sequence[int], dtype: torch.dtype, low: int = -128) -> Tensor:
    """Codes of x with the scales of `block`'s grid."""
    if dtype == torch.int8:
        return ops.quantize_int(x, scale, None, block, low, 127)
    check(op, dtype in FP8_MAX, lambda: f"codes must be torch.int8, float8_e4m3fn or float8_e5m2, got {dtype}")
    return ops.quantize_fp8(x, scale, block, dtype)


def static_block(op: str, x: Tensor, scale: Tensor, group_shape: Sequence[int] | None) -> tuple[Tensor, list[int]]:
    """A static scale as a grid, and its block. [1] is one for all; a 1-D scale says by group_shape what it is."""
    rows, cols = x.shape
    if scale.numel() == 1:
        return one(scale, x), [-1, -1]
    if scale.dim() == 1:
        wanted = None if group_shape is None else tuple(group_shape)
        check(
            op,
            wanted in ((-1, 1), (1, -1)),
            lambda: f"a 1-D scale needs group_shape [-1, 1] (channels) or [1, -1] (tokens), got {wanted}",
        )
        return (scale.reshape(1, -1), [-1, 1]) if wanted == (-1, 1) else (scale.reshape(-1, 1), [1, -1])
    block = list(group_shape) if group_shape is not None else [-(-rows // scale.shape[0]), -(-cols // scale.shape[1])]
    return scale.contiguous(), block


@alias(
    "vllm",
    "static_scaled_fp8_quant(Tensor! result, Tensor input, Tensor scale, int[]? group_shape=None) -> ()",
)
def static_scaled_fp8_quant(
    result: Tensor, input: Tensor, scale: Tensor, group_shape: Sequence[int] | None = None
) -> None:
    op, x = "static_scaled_fp8_quant", matrix(input)
    grid, block = static_block(op, x, scale, group_shape)
    store(op, "result", result, _quantized(op, x, grid, block, result.dtype))


@alias("vllm", "dynamic_scaled_fp8_quant(Tensor! result, Tensor input, Tensor! scale) -> ()")
def dynamic_scaled_fp8_quant(result: Tensor, input: Tensor, scale: Tensor) -> None:
    op = "dynamic_scaled_fp8_quant"
    codes, step = ops.rtn_fp8(matrix(input), [-1, -1], result.dtype)
    store(op, "result", result, codes)
    store(op, "scale", scale, step)


def token_fp8(op: str, x: Tensor, dtype: torch.dtype, scale_ub: Tensor | None) -> tuple[Tensor, Tensor]:
    amax = ops.absmax(x, [1, -1])
    if scale_ub is not None:
        amax = torch.minimum(amax, scale_ub.reshape(1, 1).float())
    scale = (amax / FP8_MAX[dtype]).clamp(min=_LEAST_TOKEN_SCALE)
    return _quantized(op, x, scale, [1, -1], dtype), scale


@alias(
    "vllm",
    "dynamic_per_token_scaled_fp8_quant(Tensor! result, Tensor input, Tensor! scale, Tensor? scale_ub) -> ()",
)
def dynamic_per_token_scaled_fp8_quant(result: Tensor, input: Tensor, scale: Tensor, scale_ub: Tensor | None) -> None:
    op = "dynamic_per_token_scaled_fp8_quant"
    codes, step = token_fp8(op, matrix(input), result.dtype, scale_ub)
    store(op, "result", result, codes)
    store(op, "scale", scale, step)


def _with_offset(x: Tensor, scale: Tensor, azp: Tensor) -> Tensor:
    """Offsets beyond int8, which vLLM's asymmetric scheme has: it does not stretch the range to include zero."""
    codes = torch.round(x.float() * (1.0 / scale)).nan_to_num(nan=0.0) + azp
    return codes.clamp(-128, 127).to(torch.int8)


@alias("vllm", "static_scaled_int8_quant(Tensor! result, Tensor input, Tensor scale, Tensor? azp) -> ()")
def static_scaled_int8_quant(result: Tensor, input: Tensor, scale: Tensor, azp: Tensor | None) -> None:
    op, x = "static_scaled_int8_quant", matrix(input)
    check(op, scale.numel() == 1, lambda: f"scale must be one number, got {list(scale.shape)}")
    if azp is None:
        codes = ops.quantize_int(x, one(scale, x), None, [-1, -1], -128, 127)
    else:
        codes = _with_offset(x, scale.reshape(1, 1), azp.reshape(1, 1))
    store(op, "result", result, codes)


@alias("vllm", "dynamic_scaled_int8_quant(Tensor! result, Tensor input, Tensor! scale, Tensor!? azp) -> ()")
def dynamic_scaled_int8_quant(result: Tensor, input: Tensor, scale: Tensor, azp: Tensor | None) -> None:
    op, x = "dynamic_scaled_int8_quant", matrix(input)
    if azp is None:
        codes, step, _ = ops.int8_quant_per_token(x)
    else:
        low, high = ops.minmax(x, [1, -1])
        step = ops.symmetric_scale(high - low, 255.0)
        offset = torch.round(-128.0 - low / step)
        codes = _with_offset(x, step, offset)
        store(op, "azp", azp, offset.to(torch.int32))
    store(op, "result", result, codes)
    store(op, "scale", scale, step)


def group_scale(x: Tensor, group_size: int, eps: float, limit: float, powers: bool) -> Tensor:
    """max(amax, eps) / limit of each group of a row; the next power of two above it if wanted (ue8m0)."""
    scale = ops.absmax(x, [1, group_size]).clamp(min=eps) / limit
    if powers:
        mantissa, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))
    return scale


def _by_group(
    op: str,
    input: Tensor,
    output_q: Tensor,
    output_s: Tensor,
    group_size: int,
    eps: float,
    limit: float,
    powers: bool = False,
) -> None:
    x = matrix(input)
    check(
        op,
        group_size > 0 and x.shape[1] % group_size == 0,
        lambda: f"group_size must divide input's {x.shape[1]} columns, got {group_size}",
    )
    check(
        op,
        output_s.dtype == torch.float32,
        lambda: (
            f"output_s must be torch.float32 (scales packed four to an int32 are not offered), got {output_s.dtype}"
        ),
    )
    most = 127.0 if output_q.dtype == torch.int8 else FP8_MAX.get(output_q.dtype, 0.0)
    check(op, 0 < limit <= most, lambda: f"the largest code must be in (0, {most:g}] for {output_q.dtype}, got {limit}")
    scale = group_scale(x, group_size, eps, limit, powers)
    store(op, "output_q", output_q, _quantized(op, x, scale, [1, group_size], output_q.dtype))
    store(op, "output_s", output_s, scale)


@alias(
    "vllm",
    "per_token_group_fp8_quant(Tensor input, Tensor! output_q, Tensor! output_s, int group_size, float eps, "
    "float fp8_min, float fp8_max, bool scale_ue8m0, bool dummy_is_scale_transposed, bool dummy_is_tma_aligned) -> ()",
)
def per_token_group_fp8_quant(
    input: Tensor,
    output_q: Tensor,
    output_s: Tensor,
    group_size: int,
    eps: float,
    fp8_min: float,
    fp8_max: float,
    scale_ue8m0: bool,
    dummy_is_scale_transposed: bool,
    dummy_is_tma_aligned: bool,
) -> None:
    _by_group("per_token_group_fp8_quant", input, output_q, output_s, group_size, eps, fp8_max, scale_ue8m0)


@alias(
    "vllm",
    "per_token_group_quant_int8(Tensor input, Tensor! output_q, Tensor! output_s, int group_size, float eps, "
    "float int8_min, float int8_max) -> ()",
)
def per_token_group_quant_int8(
    input: Tensor, output_q: Tensor, output_s: Tensor, group_size: int, eps: float, int8_min: float, int8_max: float
) -> None:
    _by_group("per_token_group_quant_int8", input, output_q, output_s, group_size, eps, int8_max)


@alias(
    "sglang",
    "sgl_per_token_group_quant_int8(Tensor input, Tensor! output_q, Tensor! output_s, int group_size, float eps, "
    "float int8_min, float int8_max) -> ()",
)
def sgl_per_token_group_quant_int8(
    input: Tensor, output_q: Tensor, output_s: Tensor, group_size: int, eps: float, int8_min: float, int8_max: float
) -> None:
    _by_group("sgl_per_token_group_quant_int8", input, output_q, output_s, group_size, eps, int8_max)


@alias(
    "sglang",
    "sgl_per_token_group_quant_fp8(Tensor input, Tensor! output_q, Tensor! output_s, int group_size, float eps, "
    "float fp8_min, float fp8_max, bool scale_ue8m0) -> ()",
)
def sgl_per_token_group_quant_fp8(
    input: Tensor,
    output_q: Tensor,
    output_s: Tensor,
    group_size: int,
    eps: float,
    fp8_min: float,
    fp8_max: float,
    scale_ue8m0: bool,
) -> None:
    _by_group("sgl_per_token_group_quant_fp8", input, output_q, output_s, group_size, eps, fp8_max, scale_ue8m0)


@alias(
    "sglang",
    "sgl_per_token_group_quant_8bit(Tensor input, Tensor! output_q, Tensor! output_s, int group_size, float eps, "
    "float fp8_min, float fp8_max, bool scale_ue8m0) -> ()",
)
def sgl_per_token_group_quant_8bit(
    input: Tensor,
    output_q: Tensor,
    output_s: Tensor,
    group_size: int,
    eps: float,
    fp8_min: float,
    fp8_max: float,
    scale_ue8m0: bool,
) -> None:
    _by_group("sgl_per_token_group_quant_8bit", input, output_q, output_s, group_size, eps, fp8_max, scale_ue8m0)


@alias(
    "sglang",
    "sgl_per_token_group_quant_8bit_v2(Tensor input, Tensor! output_q, Tensor! output_s, int group_size, float eps, "
    "float fp8_min, float fp8_max, bool scale_ue8m0, bool fuse_silu_and_mul, Tensor? masked_m) -> ()",
)
def sgl_per_token_group_quant_8bit_v2(
    input: Tensor,
    output_q: Tensor,
    output_s: Tensor,
    group_size: int,
    eps: float,
    fp8_min: float,
    fp8_max: float,
    scale_ue8m0: bool,
    fuse_silu_and_mul: bool,
    masked_m: Tensor | None,
) -> None:
    op = "sgl_per_token_group_quant_8bit_v2"
    check(op, masked_m is None, lambda: "masked_m is not offered: give the rows that are used")
    if fuse_silu_and_mul:
        gate, up = input.chunk(2, -1)
        input = ops.silu_mul(gate, up)
    _by_group(op, input, output_q, output_s, group_size, eps, fp8_max, scale_ue8m0)


@alias("sglang", "sgl_per_tensor_quant_fp8(Tensor input, Tensor! output_q, Tensor! output_s, bool is_static) -> ()")
def sgl_per_tensor_quant_fp8(input: Tensor, output_q: Tensor, output_s: Tensor, is_static: bool) -> None:
    op, x = "sgl_per_tensor_quant_fp8", matrix(input)
    if is_static:
        store(op, "output_q", output_q, _quantized(op, x, one(output_s, x), [-1, -1], output_q.dtype))
    else:
        codes, step = ops.rtn_fp8(x, [-1, -1], output_q.dtype)
        store(op, "output_q", output_q, codes)
        store(op, "output_s", output_s, step)


@alias("sglang", "sgl_per_token_quant_fp8(Tensor input, Tensor! output_q, Tensor! output_s) -> ()")
def sgl_per_token_quant_fp8(input: Tensor, output_q: Tensor, output_s: Tensor) -> None:
    op = "sgl_per_token_quant_fp8"
    codes, step = ops.fp8_quant_per_token(matrix(input), output_q.dtype)
    store(op, "output_q", output_q, codes)
    store(op, "output_s", output_s, step)


def _int8_cpu_fake(A: Tensor) -> tuple[Tensor, Tensor]:
    return A.new_empty(A.shape, dtype=torch.uint8), A.new_empty(A.shape[:-1].numel(), dtype=torch.float32)


@alias("sglang", "per_token_quant_int8_cpu(Tensor A) -> (Tensor, Tensor)", _int8_cpu_fake)
def per_token_quant_int8_cpu(A: Tensor) -> tuple[Tensor, Tensor]:
    """Codes are unsigned there, code + 128, as u8 x s8 products want them."""
    codes, scale, _ = ops.int8_quant_per_token(A)
    return (codes.to(torch.int16) + 128).to(torch.uint8), scale.reshape(-1)


# ---- NVFP4 ----
def swizzled_shape(rows: int, groups: int) -> tuple[int, int]:
    return -(-rows // 128) * 128, -(-groups // 4) * 4


def swizzle(scales: Tensor) -> Tensor:
    """fp32 or e4m3 scales [M, G] as Blackwell's tensor cores read them: tiles of 128 rows by 4 groups, 32 rows times 4
    apart side by side; [ceil(M / 128) * 128, ceil(G / 4) * 4], zero beyond."""
    rows, groups = swizzled_shape(*scales.shape)
    padded = torch.zeros((rows, groups), dtype=torch.uint8, device=scales.device)
    padded[: scales.shape[0], : scales.shape[1]] = scales.view(torch.uint8)
    return padded.view(rows // 128, 4, 32, groups // 4, 4).permute(0, 3, 2, 1, 4).reshape(rows, groups)


def unswizzle(scales: Tensor, rows: int, groups: int) -> Tensor:
    """The inverse: e4m3 [rows, groups]."""
    m, g = swizzled_shape(rows, groups)
    tiles = scales.contiguous().view(torch.uint8).reshape(m // 128, g // 4, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(m, g)[:rows, :groups].contiguous().view(torch.float8_e4m3fn)


def fp4(op: str, x: Tensor, global_scale: Tensor, swizzled: bool) -> tuple[Tensor, Tensor]:
    """Codes uint8 [M, K / 2] and the bytes of the e4m3 scales, swizzled and seen as int32 or [M, K / 16]."""
    check(op, x.shape[1] % 16 == 0, lambda: f"input must have a multiple of 16 columns, got {x.shape[1]}")
    number = global_scale.reshape(1).float()
    scale = ops.nvfp4_scale(ops.absmax(x, [1, 16]), number)
    local = ops.nvfp4_local(scale, number)
    codes = ops.quantize_fp4(x, scale, 16)
    return codes, swizzle(local).view(torch.int32) if swizzled else local.view(torch.uint8)


def _fp4_fake(input: Tensor, input_scale: Tensor, is_sf_swizzled_layout: bool) -> tuple[Tensor, Tensor]:
    cols = input.shape[-1]
    rows, groups = input.numel() // cols, cols // 16
    codes = input.new_empty((rows, cols // 2), dtype=torch.uint8)
    if not is_sf_swizzled_layout:
        return codes, input.new_empty((rows, groups), dtype=torch.uint8)
    m, g = -(-rows // 128) * 128, -(-groups // 4)
    return codes, input.new_empty((m, g), dtype=torch.int32)


@alias(
    "vllm",
    "scaled_fp4_quant(Tensor input, Tensor input_scale, bool is_sf_swizzled_layout) -> (Tensor, Tensor)",
    _fp4_fake,
)
def scaled_fp4_quant(input: Tensor, input_scale: Tensor, is_sf_swizzled_layout: bool) -> tuple[Tensor, Tensor]:
    return fp4("scaled_fp4_quant", matrix(input), input_scale, is_sf_swizzled_layout)


def _store_fp4(op: str, output: Tensor, output_scale: Tensor, codes: Tensor, scales: Tensor) -> None:
    store(op, "output", output.view(torch.uint8), codes)
    store(op, "output_scale", output_scale.view(torch.uint8), scales.view(torch.uint8))


@alias(
    "vllm",
    "scaled_fp4_quant.out(Tensor input, Tensor input_scale, bool is_sf_swizzled_layout, *, Tensor(a!) output, "
    "Tensor(b!) output_scale) -> ()",
)
def scaled_fp4_quant_out(
    input: Tensor, input_scale: Tensor, is_sf_swizzled_layout: bool, *, output: Tensor, output_scale: Tensor
) -> None:
    op = "scaled_fp4_quant"
    _store_fp4(op, output, output_scale, *fp4(op, matrix(input), input_scale, is_sf_swizzled_layout))


@alias(
    "sglang",
    "scaled_fp4_quant.sglang(Tensor! output, Tensor input, Tensor! output_scale, Tensor input_scale) -> ()",
)
def scaled_fp4_quant_sglang(output: Tensor, input: Tensor, output_scale: Tensor, input_scale: Tensor) -> None:
    op = "scaled_fp4_quant"
    _store_fp4(op, output, output_scale, *fp4(op, matrix(input), input_scale, True))
