"""W8A8 and FP8 Linears of vLLM's and SGLang's CPU kernels, whose weights are packed by an op of their own."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit import ops

from ._define import alias, check
from .gemm import _scaled


@dataclass(frozen=True)
class _Weight:
    packed: Tensor
    scale: Tensor  # fp32 [1] or [N]
    sums: Tensor  # int32 [N]: of its columns
    cols: int


_LOCK = threading.Lock()
_WEIGHTS: dict[int, _Weight] = {}
_IDS = itertools.count(1)


@alias(
    "vllm",
    "create_onednn_scaled_mm_handler(Tensor b, Tensor b_scales, ScalarType output_type, bool dynamic_act_quant, "
    "bool use_azp, int primitive_cache_size) -> int",
    lambda *_: 0,
)
def create_onednn_scaled_mm_handler(
    b: Tensor,
    b_scales: Tensor,
    output_type: torch.dtype,
    dynamic_act_quant: bool,
    use_azp: bool,
    primitive_cache_size: int,
) -> int:
    """b int8 [K, N], packed once and kept until `release_dnnl_matmul_handler`."""
    op, cols = "create_onednn_scaled_mm_handler", b.shape[1]
    check(op, b.dtype == torch.int8, lambda: f"b must be torch.int8 [K, N], got {b.dtype}")
    check(op, b_scales.numel() in (1, cols), lambda: f"b_scales must have 1 or {cols} elements, got {b_scales.numel()}")
    weight = b.t().contiguous()
    made = _Weight(ops.pack_w8a8(weight), b_scales.reshape(-1).float(), weight.sum(1, dtype=torch.int32), cols)
    with _LOCK:
        handler = next(_IDS)
        _WEIGHTS[handler] = made
    return handler


@alias("vllm", "release_dnnl_matmul_handler(int handler) -> ()")
def release_dnnl_matmul_handler(handler: int) -> None:
    with _LOCK:
        _WEIGHTS.pop(handler, None)


@alias(
    "vllm",
    "onednn_scaled_mm(Tensor! c, Tensor a, Tensor a_scales, Tensor? azp, Tensor? azp_adj, Tensor? bias, "
    "Tensor handler_tensor) -> ()",
)
def onednn_scaled_mm(
    c: Tensor,
    a: Tensor,
    a_scales: Tensor,
    azp: Tensor | None,
    azp_adj: Tensor | None,
    bias: Tensor | None,
    handler_tensor: Tensor,
) -> None:
    """a_s b_s (a b - azp sum(b)) + bias. `azp_adj` is not needed: the sums of columns are known."""
    weight = _WEIGHTS.get(int(handler_tensor))
    check("onednn_scaled_mm", weight is not None, lambda: f"no such handler: {int(handler_tensor)}")
    assert weight is not None
    sums = ops.int8_gemm(a, weight.packed, weight.cols)
    if azp is not None:
        sums = sums - azp.reshape(-1, 1).to(torch.int32) * weight.sums
    y = sums.float() * (a_scales.reshape(-1, 1).float() * weight.scale)
    c.copy_(y if bias is None else y + bias.float())


# ---- weights packed by convert_weight_packed ----
def _convert_fake(weight: Tensor) -> Tensor:
    from quantkit.ops._library import REFERENCES

    name = {torch.int8: "pack_w8a8", torch.float8_e4m3fn: "pack_fp8"}.get(weight.dtype, "pack_bf16")
    one = weight[0] if weight.dim() == 3 else weight
    shape = REFERENCES[name](one.new_empty(one.shape, device="meta")).shape
    dtype = torch.int32 if name == "pack_bf16" else torch.int8
    return weight.new_empty((*weight.shape[:-2], *shape), dtype=dtype)


@alias("vllm, sglang", "convert_weight_packed(Tensor weight) -> Tensor", _convert_fake)
def convert_weight_packed(weight: Tensor) -> Tensor:
    """int8, FP8 or bf16 [N, K] (or [E, N, K]) -> what the other ops here read. FP8 and bf16 need N % 64 == 0."""
    op = "convert_weight_packed"
    pack = {torch.int8: ops.pack_w8a8, torch.float8_e4m3fn: ops.pack_fp8, torch.bfloat16: ops.pack_bf16}.get(
        weight.dtype
    )
    check(op, pack is not None, lambda: f"weight must be torch.int8, float8_e4m3fn or bfloat16, got {weight.dtype}")
    assert pack is not None
    check(
        op,
        weight.dtype == torch.int8 or weight.shape[-2] % 64 == 0,
        lambda: f"weight must have a multiple of 64 rows, got {weight.shape[-2]}",
    )
    return torch.stack([pack(e) for e in weight]) if weight.dim() == 3 else pack(weight)


def _out_fake(mat1: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return mat1.new_empty((mat1.shape[0], scales.numel()), dtype=dtype)


@alias(
    "vllm, sglang",
    "int8_scaled_mm_with_quant(Tensor mat1, Tensor mat2, Tensor scales2, Tensor? bias, ScalarType out_dtype, "
    "bool is_vnni) -> Tensor",
    lambda mat1, mat2, scales2, bias, out_dtype, is_vnni: _out_fake(mat1, scales2, out_dtype),
)
def int8_scaled_mm_with_quant(
    mat1: Tensor, mat2: Tensor, scales2: Tensor, bias: Tensor | None, out_dtype: torch.dtype, is_vnni: bool
) -> Tensor:
    weight = mat2 if is_vnni else ops.pack_w8a8(mat2)
    added = None if bias is None else bias.float()
    y = ops.w8a8_gemm(mat1, weight, scales2.reshape(-1).float(), scales2.numel(), bias=added)
    return y.to(out_dtype)


@alias(
    "sglang",
    "int8_scaled_mm_cpu(Tensor mat1, Tensor mat2, Tensor scales1, Tensor scales2, Tensor? bias, ScalarType out_dtype, "
    "bool is_vnni) -> Tensor",
    lambda mat1, mat2, scales1, scales2, bias, out_dtype, is_vnni: _out_fake(mat1, scales2, out_dtype),
)
def int8_scaled_mm_cpu(
    mat1: Tensor,
    mat2: Tensor,
    scales1: Tensor,
    scales2: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    is_vnni: bool,
) -> Tensor:
    """mat1: what `per_token_quant_int8_cpu` gave, unsigned codes (code + 128), or int8 ones."""
    a = (mat1.to(torch.int16) - 128).to(torch.int8) if mat1.dtype == torch.uint8 else mat1
    if not is_vnni:
        return _scaled("int8_scaled_mm_cpu", a, mat2.t(), scales1, scales2, bias, out_dtype)
    sums = ops.int8_gemm(a, mat2, scales2.numel())
    y = sums.float() * (scales1.reshape(-1, 1).float() * scales2.reshape(-1).float())
    return (y if bias is None else y + bias.float()).to(out_dtype)


def _fp8_cpu_fake(
    mat1: Tensor,
    mat2: Tensor,
    scales2: Tensor,
    block_size: Sequence[int],
    bias: Tensor | None,
    out_dtype: torch.dtype,
    is_vnni: bool,
) -> Tensor:
    cols = mat2.shape[0] * 64 if is_vnni else mat2.shape[0]
    return mat1.new_empty((mat1.shape[0], cols), dtype=out_dtype)


def _fp8_cpu(
    mat1: Tensor,
    mat2: Tensor,
    scales2: Tensor,
    block_size: Sequence[int],
    bias: Tensor | None,
    out_dtype: torch.dtype,
    is_vnni: bool,
) -> Tensor:
    weight = mat2 if is_vnni else ops.pack_fp8(mat2)
    cols = mat2.shape[0] * 64 if is_vnni else mat2.shape[0]
    added = None if bias is None else bias.float()
    return ops.fp8_gemm(mat1, weight, scales2.float(), list(block_size), cols, bias=added).to(out_dtype)


_FP8_CPU = "Tensor mat1, Tensor mat2, Tensor scales2, {} block_size, Tensor? bias, ScalarType out_dtype, bool is_vnni"
alias("vllm, sglang", f"fp8_scaled_mm_cpu({_FP8_CPU.format('SymInt[]')}) -> Tensor", _fp8_cpu_fake)(_fp8_cpu)


@alias(
    "sglang",
    "weight_packed_linear(Tensor mat1, Tensor mat2, Tensor? bias, bool is_vnni) -> Tensor",
    lambda mat1, mat2, bias, is_vnni: mat1.new_empty((mat1.shape[0], mat2.shape[0] * (64 if is_vnni else 1))),
)
def weight_packed_linear(mat1: Tensor, mat2: Tensor, bias: Tensor | None, is_vnni: bool) -> Tensor:
    weight = mat2 if is_vnni else ops.pack_bf16(mat2)
    cols = mat2.shape[0] * 64 if is_vnni else mat2.shape[0]
    return ops.bf16_gemm(mat1, weight, cols, bias=bias)
