"""RMS norm and SiLU, with and without codes for the next product, in the words of vLLM and sgl-kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit import ops
from quantkit.ops.quantize import FP8_MAX

from ._define import alias, check, matrix, one, store
from .quantize import _LEAST_TOKEN_SCALE, _quantized, _store_fp4, fp4


def _normed(input: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float) -> Tensor:
    """The norm of input + residual; the sum takes residual's place."""
    if residual is None:
        return ops.rms_norm(input, weight, epsilon)
    out, total = ops.add_rms_norm(input, residual, weight, epsilon)
    residual.copy_(total)
    return out


@alias("sglang", "rmsnorm(Tensor! output, Tensor input, Tensor weight, float eps, bool enable_pdl) -> ()")
def rmsnorm(output: Tensor, input: Tensor, weight: Tensor, eps: float, enable_pdl: bool) -> None:
    output.copy_(ops.rms_norm(input, weight, eps))


@alias(
    "sglang",
    "fused_add_rmsnorm(Tensor! input, Tensor! residual, Tensor weight, float eps, bool enable_pdl) -> ()",
)
def fused_add_rmsnorm(input: Tensor, residual: Tensor, weight: Tensor, eps: float, enable_pdl: bool) -> None:
    input.copy_(_normed(input, residual, weight, eps))


@alias("vllm", "fused_add_rms_norm(Tensor! input, Tensor! residual, Tensor? weight, float epsilon) -> ()")
def fused_add_rms_norm(input: Tensor, residual: Tensor, weight: Tensor | None, epsilon: float) -> None:
    ones = torch.ones(input.shape[-1], dtype=input.dtype, device=input.device) if weight is None else weight
    input.copy_(_normed(input, residual, ones, epsilon))


@alias("vllm, sglang", "silu_and_mul(Tensor! out, Tensor input) -> ()")
def silu_and_mul(out: Tensor, input: Tensor) -> None:
    gate, up = input.chunk(2, -1)
    out.copy_(ops.silu_mul(gate, up))


def _by_tensor(op: str, result: Tensor, x: Tensor, scale: Tensor) -> None:
    check(op, scale.numel() == 1, lambda: f"scale must be one number, got {list(scale.shape)}")
    rows = matrix(x)
    store(op, "result", result, _quantized(op, rows, one(scale, rows), [-1, -1], result.dtype))


@alias("vllm", "silu_and_mul_quant(Tensor! result, Tensor input, Tensor scale) -> ()")
def silu_and_mul_quant(result: Tensor, input: Tensor, scale: Tensor) -> None:
    gate, up = input.chunk(2, -1)
    _by_tensor("silu_and_mul_quant", result, ops.silu_mul(gate, up), scale)


@alias(
    "vllm",
    "rms_norm_static_fp8_quant(Tensor! result, Tensor input, Tensor weight, Tensor scale, float epsilon) -> ()",
)
def rms_norm_static_fp8_quant(result: Tensor, input: Tensor, weight: Tensor, scale: Tensor, epsilon: float) -> None:
    _by_tensor("rms_norm_static_fp8_quant", result, ops.rms_norm(input, weight, epsilon), scale)


@alias(
    "vllm",
    "fused_add_rms_norm_static_fp8_quant(Tensor! result, Tensor input, Tensor! residual, Tensor weight, Tensor scale, "
    "float epsilon) -> ()",
)
def fused_add_rms_norm_static_fp8_quant(
    result: Tensor, input: Tensor, residual: Tensor, weight: Tensor, scale: Tensor, epsilon: float
) -> None:
    _by_tensor("fused_add_rms_norm_static_fp8_quant", result, _normed(input, residual, weight, epsilon), scale)


@alias(
    "vllm",
    "rms_norm_dynamic_per_token_quant(Tensor! result, Tensor input, Tensor weight, Tensor! scale, float epsilon, "
    "Tensor? scale_ub, Tensor!? residual) -> ()",
)
def rms_norm_dynamic_per_token_quant(
    result: Tensor,
    input: Tensor,
    weight: Tensor,
    scale: Tensor,
    epsilon: float,
    scale_ub: Tensor | None,
    residual: Tensor | None,
) -> None:
    op = "rms_norm_dynamic_per_token_quant"
    if scale_ub is None:
        codes, step, total = ops.rms_norm_quant(input, weight, epsilon, residual=residual, dtype=result.dtype)
        if residual is not None and total is not None:
            residual.copy_(total)
    else:
        check(op, result.dtype in FP8_MAX, lambda: f"scale_ub goes with FP8 results, got {result.dtype}")
        x = matrix(_normed(input, residual, weight, epsilon))
        amax = torch.minimum(ops.absmax(x, [1, -1]), scale_ub.reshape(1, 1).float())
        step = (amax / FP8_MAX[result.dtype]).clamp(min=_LEAST_TOKEN_SCALE)
        codes = ops.quantize_fp8(x, step, [1, -1], result.dtype)
    store(op, "result", result, codes)
    store(op, "scale", scale, step)


def _by_group(
    op: str, result: Tensor, x: Tensor, scales: Tensor, group_size: int, scale_ub: Tensor | None, transposed: bool
) -> None:
    """`scales` [tokens, groups] with any strides, or [groups, tokens] if `transposed` says so."""
    rows = matrix(x)
    check(
        op,
        group_size > 0 and rows.shape[1] % group_size == 0,
        lambda: f"group_size must divide {rows.shape[1]} columns, got {group_size}",
    )
    amax = ops.absmax(rows, [1, group_size])
    if scale_ub is not None:
        amax = torch.minimum(amax, scale_ub.reshape(1, 1).float())
    limit = 127.0 if result.dtype == torch.int8 else FP8_MAX.get(result.dtype, 1.0)
    least = 2.0**-100 if result.dtype == torch.int8 else _LEAST_TOKEN_SCALE
    step = (amax / limit).clamp(min=least)
    store(op, "result", result, _quantized(op, rows, step, [1, group_size], result.dtype))
    as_given = transposed and scales.dim() == 2 and scales.shape == step.shape[::-1] and scales.shape != step.shape
    store(op, "scale", scales, step.t() if as_given else step)


@alias(
    "vllm",
    "rms_norm_per_block_quant(Tensor! result, Tensor input, Tensor weight, Tensor! scale, float epsilon, "
    "Tensor? scale_ub, Tensor!? residual, int group_size, bool is_scale_transposed) -> ()",
)
def rms_norm_per_block_quant(
    result: Tensor,
    input: Tensor,
    weight: Tensor,
    scale: Tensor,
    epsilon: float,
    scale_ub: Tensor | None,
    residual: Tensor | None,
    group_size: int,
    is_scale_transposed: bool,
) -> None:
    x = _normed(input, residual, weight, epsilon)
    _by_group("rms_norm_per_block_quant", result, x, scale, group_size, scale_ub, is_scale_transposed)


@alias(
    "vllm",
    "silu_and_mul_per_block_quant(Tensor! out, Tensor input, Tensor! scales, int group_size, Tensor? scale_ub=None, "
    "bool is_scale_transposed=False) -> ()",
)
def silu_and_mul_per_block_quant(
    out: Tensor,
    input: Tensor,
    scales: Tensor,
    group_size: int,
    scale_ub: Tensor | None = None,
    is_scale_transposed: bool = False,
) -> None:
    gate, up = input.chunk(2, -1)
    x = ops.silu_mul(gate, up)
    _by_group("silu_and_mul_per_block_quant", out, x, scales, group_size, scale_ub, is_scale_transposed)


@alias(
    "vllm",
    "silu_and_mul_nvfp4_quant(Tensor! result, Tensor! result_block_scale, Tensor input, Tensor input_global_scale)"
    " -> ()",
)
def silu_and_mul_nvfp4_quant(
    result: Tensor, result_block_scale: Tensor, input: Tensor, input_global_scale: Tensor
) -> None:
    op = "silu_and_mul_nvfp4_quant"
    gate, up = input.chunk(2, -1)
    made = fp4(op, matrix(ops.silu_mul(gate, up)), input_global_scale, True)
    _store_fp4(op, result, result_block_scale, *made)
