"""Products of 8-bit activations and 8-bit or FP4 weights in the words of vLLM and sgl-kernel.

Sums are quantkit's: exact for int8, fp32 for FP8. Scales multiply them in fp32, and the result is rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit import ops

from ._define import alias, check
from .frozen import packed
from .quantize import unswizzle

_E4M3 = torch.float8_e4m3fn


def _check_pair(op: str, a: Tensor, b: Tensor, names: tuple[str, str] = ("a", "b")) -> None:
    one, other = names
    check(
        op,
        a.dim() == 2 and b.dim() == 2 and a.shape[1] == b.shape[0] and a.dtype == b.dtype,
        lambda: (
            f"{one} [M, K] and {other} [K, N] must be of one dtype and share K, got {a.dtype} {list(a.shape)} and "
            f"{b.dtype} {list(b.shape)}"
        ),
    )
    check(op, a.dtype in (torch.int8, _E4M3), lambda: f"{one} must be torch.int8 or float8_e4m3fn, got {a.dtype}")
    check(
        op,
        b.shape[0] <= 1 or b.stride(0) == 1,
        lambda: f"{other} must be column-major (the transpose of [N, K]), got strides {list(b.stride())}",
    )


def _rows_scale(op: str, name: str, scale: Tensor, rows: int) -> Tensor:
    """Scales of tokens as [M, 1], or [1, 1]."""
    check(op, scale.numel() in (1, rows), lambda: f"{name} must have 1 or {rows} elements, got {list(scale.shape)}")
    return scale.reshape(-1, 1).float()


def _channel_scale(op: str, name: str, scale: Tensor, cols: int) -> Tensor:
    check(op, scale.numel() in (1, cols), lambda: f"{name} must have 1 or {cols} elements, got {list(scale.shape)}")
    return scale.reshape(-1).float()


def int8_sums(a: Tensor, b: Tensor) -> Tensor:
    """int32 [M, N] of a int8 [M, K] and b int8 [K, N], column-major."""
    weight = packed("pack_w8a8", b, lambda: ops.pack_w8a8(b.t().contiguous()))
    return ops.int8_gemm(a, weight, b.shape[1])


def _fp8_sums(a: Tensor, b: Tensor) -> Tensor:
    """fp32 [M, N] of e4m3 codes, products exact. A scale of one makes of the codes of a what they are."""
    weight = packed("pack_fp8", b, lambda: ops.pack_fp8(b.t().contiguous()))
    one = torch.ones((1, 1), device=a.device)
    return ops.fp8_gemm(a.float(), weight, one, [-1, -1], b.shape[1], input_scale=one.reshape(1))


def _blocked(op: str, a: Tensor, b: Tensor, scales_a: Tensor, scales_b: Tensor) -> Tensor:
    """fp32 [M, N]: a with a scale for each 128 columns of a token, b for each block of 128 x 128."""
    (rows, depth), cols = a.shape, b.shape[1]
    steps = -(-depth // 128)
    check(
        op,
        tuple(scales_a.shape) == (rows, steps) and tuple(scales_b.shape) == (steps, -(-cols // 128)),
        lambda: (
            f"scales of blocks must be [{rows}, {steps}] and [{steps}, {-(-cols // 128)}], got {list(scales_a.shape)} "
            f"and {list(scales_b.shape)}"
        ),
    )
    weight = packed("pack_fp8", b, lambda: ops.pack_fp8(b.t().contiguous()))
    x = a.float() * scales_a.float().repeat_interleave(128, 1)[:, :depth]
    return ops.fp8_gemm(x, weight, scales_b.t().float().contiguous(), [128, 128], cols)


def _scaled(
    op: str, a: Tensor, b: Tensor, scales_a: Tensor, scales_b: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    rows, cols = a.shape[0], b.shape[1]
    if a.dtype == _E4M3 and (scales_a.numel() not in (1, rows) or scales_b.numel() not in (1, cols)):
        y = _blocked(op, a, b, scales_a, scales_b)
    else:
        step = _rows_scale(op, "a_scales", scales_a, rows) * _channel_scale(op, "b_scales", scales_b, cols)
        y = (int8_sums(a, b).float() if a.dtype == torch.int8 else _fp8_sums(a, b)) * step
    if bias is not None:
        check(op, bias.numel() == cols, lambda: f"bias must have {cols} elements, got {list(bias.shape)}")
        y = y + bias.reshape(-1).float()
    return y.to(dtype)


@alias(
    "vllm",
    "cutlass_scaled_mm(Tensor! out, Tensor a, Tensor b, Tensor a_scales, Tensor b_scales, Tensor? bias) -> ()",
)
def cutlass_scaled_mm(
    out: Tensor, a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, bias: Tensor | None
) -> None:
    _check_pair("cutlass_scaled_mm", a, b)
    out.copy_(_scaled("cutlass_scaled_mm", a, b, a_scales, b_scales, bias, out.dtype))


def with_offsets(
    op: str,
    sums: Tensor,
    a_scales: Tensor,
    b_scales: Tensor,
    azp_adj: Tensor,
    azp: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """a_s (b_s (sums - azp[m] * azp_adj[n])) + bias; without azp the adjustment has it already."""
    rows, cols = sums.shape
    check(
        op,
        azp_adj.numel() == cols and azp_adj.dtype == torch.int32,
        lambda: f"azp_adj must be torch.int32 with {cols} elements, got {azp_adj.dtype} {list(azp_adj.shape)}",
    )
    less = azp_adj.reshape(1, -1)
    if azp is not None:
        check(op, azp.numel() == rows, lambda: f"azp must have {rows} elements, got {list(azp.shape)}")
        less = azp.reshape(-1, 1).to(torch.int32) * less
    step = _rows_scale(op, "a_scales", a_scales, rows) * _channel_scale(op, "b_scales", b_scales, cols)
    y = (sums - less).float() * step
    return (y if bias is None else y + bias.reshape(-1).float()).to(dtype)


@alias(
    "vllm",
    "cutlass_scaled_mm_azp(Tensor! out, Tensor a, Tensor b, Tensor a_scales, Tensor b_scales, Tensor azp_adj, "
    "Tensor? azp, Tensor? bias) -> ()",
)
def cutlass_scaled_mm_azp(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    a_scales: Tensor,
    b_scales: Tensor,
    azp_adj: Tensor,
    azp: Tensor | None,
    bias: Tensor | None,
) -> None:
    op = "cutlass_scaled_mm_azp"
    _check_pair(op, a, b)
    check(op, a.dtype == torch.int8, lambda: f"a must be torch.int8, got {a.dtype}")
    out.copy_(with_offsets(op, int8_sums(a, b), a_scales, b_scales, azp_adj, azp, bias, out.dtype))


def _supports_fp8(cuda_device_capability: int) -> bool:
    """Whether the CUDA kernels are compiled for it: they need no tensor cores for FP8."""
    return cuda_device_capability >= 80


alias("vllm", "cutlass_scaled_mm_supports_fp8(int cuda_device_capability) -> bool")(_supports_fp8)
alias("vllm", "cutlass_scaled_mm_supports_block_fp8(int cuda_device_capability) -> bool")(_supports_fp8)
alias("vllm", "cutlass_scaled_mm_supports_fp4(int cuda_device_capability) -> bool")(_supports_fp8)


def _mm_fake(
    mat_a: Tensor,
    mat_b: Tensor,
    scales_a: Tensor,
    scales_b: Tensor,
    out_dtype: torch.dtype,
    bias: Tensor | None = None,
) -> Tensor:
    return mat_a.new_empty((mat_a.shape[0], mat_b.shape[1]), dtype=out_dtype)


def _mm(
    op: str, kind: torch.dtype, a: Tensor, b: Tensor, sa: Tensor, sb: Tensor, dtype: torch.dtype, bias: Tensor | None
) -> Tensor:
    _check_pair(op, a, b, ("mat_a", "mat_b"))
    check(op, a.dtype == kind, lambda: f"mat_a must be {kind}, got {a.dtype}")
    return _scaled(op, a, b, sa, sb, bias, dtype)


@alias(
    "sglang",
    "int8_scaled_mm(Tensor mat_a, Tensor mat_b, Tensor scales_a, Tensor scales_b, ScalarType out_dtype, Tensor? bias)"
    " -> Tensor",
    _mm_fake,
)
def int8_scaled_mm(
    mat_a: Tensor, mat_b: Tensor, scales_a: Tensor, scales_b: Tensor, out_dtype: torch.dtype, bias: Tensor | None
) -> Tensor:
    return _mm("int8_scaled_mm", torch.int8, mat_a, mat_b, scales_a, scales_b, out_dtype, bias)


@alias(
    "sglang",
    "fp8_scaled_mm(Tensor mat_a, Tensor mat_b, Tensor scales_a, Tensor scales_b, ScalarType out_dtype, Tensor? bias)"
    " -> Tensor",
    _mm_fake,
)
def fp8_scaled_mm(
    mat_a: Tensor, mat_b: Tensor, scales_a: Tensor, scales_b: Tensor, out_dtype: torch.dtype, bias: Tensor | None
) -> Tensor:
    return _mm("fp8_scaled_mm", _E4M3, mat_a, mat_b, scales_a, scales_b, out_dtype, bias)


@alias(
    "sglang",
    "fp8_blockwise_scaled_mm(Tensor mat_a, Tensor mat_b, Tensor scales_a, Tensor scales_b, ScalarType out_dtype)"
    " -> Tensor",
    _mm_fake,
)
def fp8_blockwise_scaled_mm(
    mat_a: Tensor, mat_b: Tensor, scales_a: Tensor, scales_b: Tensor, out_dtype: torch.dtype
) -> Tensor:
    op = "fp8_blockwise_scaled_mm"
    _check_pair(op, mat_a, mat_b, ("mat_a", "mat_b"))
    check(op, mat_a.dtype == _E4M3, lambda: f"mat_a must be float8_e4m3fn, got {mat_a.dtype}")
    return _blocked(op, mat_a, mat_b, scales_a, scales_b).to(out_dtype)


# ---- NVFP4 ----
@alias(
    "vllm, sglang",
    "cutlass_scaled_fp4_mm(Tensor! out, Tensor a, Tensor b, Tensor block_scale_a, Tensor block_scale_b, Tensor alpha)"
    " -> ()",
)
def cutlass_scaled_fp4_mm(
    out: Tensor, a: Tensor, b: Tensor, block_scale_a: Tensor, block_scale_b: Tensor, alpha: Tensor
) -> None:
    op = "cutlass_scaled_fp4_mm"
    check(
        op,
        a.dim() == 2 and b.dim() == 2 and a.shape[1] == b.shape[1] and a.dtype == b.dtype == torch.uint8,
        lambda: f"a [M, K / 2] and b [N, K / 2] must be torch.uint8 and share K, got {list(a.shape)}, {list(b.shape)}",
    )
    (rows, half), cols = a.shape, b.shape[0]
    check(op, half % 8 == 0, lambda: f"K must be a multiple of 16, got {2 * half}")
    groups = half // 8
    weight = packed("pack_fp4", b, lambda: ops.pack_fp8(ops.unpack_fp4(b)))
    scale_a = unswizzle(block_scale_a, rows, groups).float()
    scale_b = unswizzle(block_scale_b, cols, groups).float()
    x = ops.unpack_fp4(a).float() * scale_a.repeat_interleave(16, 1)
    y = ops.fp8_gemm(x, weight, scale_b.contiguous(), [1, 16], cols)
    out.copy_(y * alpha.reshape(1, 1).float())
