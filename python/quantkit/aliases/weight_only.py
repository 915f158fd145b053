"""int4 and int8 weights with 16-bit activations in the words of vLLM and sgl-kernel: GPTQ, AWQ, Marlin, vLLM's CPU.

What a repacking op gives back is quantkit's layout in the shape of the peer's, which only its own GEMM reads: the
ops of a pair go together. It needs N % 64 == 0, as Marlin does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit import ops

from . import layouts
from ._define import alias, check
from .frozen import packed

# vllm::ScalarType ids: bits, and whether zero points are given.
_MARLIN_TYPES = {1125899906843648: (4, True), 1125899907892224: (4, False), 1125899923621888: (8, False)}


def _check_bits(op: str, bits: int) -> None:
    check(op, bits in (4, 8), lambda: f"codes must have 4 or 8 bits, got {bits}")


def _some(perm: Tensor | None) -> Tensor | None:
    """A permutation, which peers give as an empty tensor where there is none."""
    return None if perm is None or perm.numel() == 0 else perm.to(torch.int32)


def _group(op: str, depth: int, groups: int) -> int:
    check(op, groups > 0 and depth % groups == 0, lambda: f"K = {depth} must be a multiple of the {groups} groups")
    return depth // groups


def _fits(op: str, cols: int) -> None:
    check(op, cols % 64 == 0, lambda: f"N must be a multiple of 64, got {cols}")


# ---- GPTQ ----
def _gptq(
    op: str, a: Tensor, weight: Tensor, qzeros: Tensor, scales: Tensor, perm: Tensor | None, v2: bool, bits: int
) -> Tensor:
    groups, cols = scales.shape
    return ops.wna16_gemm(
        a,
        weight,
        scales.t().contiguous(),
        bits,
        cols,
        _group(op, a.shape[1], groups),
        weight_zero_point=layouts.gptq_zero_points(qzeros, bits, v2),
        perm=perm,
    )


def _gptq_gemm(
    a: Tensor,
    b_q_weight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None,
    shuffled: bool,
    v2: bool,
    bits: int,
) -> Tensor:
    op = "gptq_gemm"
    _check_bits(op, bits)
    cols = b_q_weight.shape[1]
    if shuffled:  # g_idx is the order of columns that gptq_shuffle was given
        _fits(op, cols)
        weight, perm = b_q_weight.reshape(cols // 64, -1, 64), _some(g_idx)
    else:
        # The group of each column: sorted by it, groups are contiguous.
        perm = None if g_idx is None or not g_idx.numel() else torch.argsort(g_idx, stable=True).to(torch.int32)
        weight = packed("gptq", b_q_weight, lambda: layouts.pack_gptq(b_q_weight, bits, perm))
    return _gptq(op, a, weight, qzeros, scales, perm, v2, bits)


def _gptq_fake(a: Tensor, b_q_weight: Tensor, *_: object) -> Tensor:
    return a.new_empty((a.shape[0], b_q_weight.shape[1]))


@alias(
    "vllm",
    "gptq_gemm(Tensor a, Tensor b_q_weight, Tensor b_gptq_qzeros, Tensor b_gptq_scales, Tensor b_g_idx, "
    "bool use_exllama, bool use_v2_format, int bit) -> Tensor",
    _gptq_fake,
)
def gptq_gemm(
    a: Tensor,
    b_q_weight: Tensor,
    b_gptq_qzeros: Tensor,
    b_gptq_scales: Tensor,
    b_g_idx: Tensor,
    use_exllama: bool,
    use_v2_format: bool,
    bit: int,
) -> Tensor:
    return _gptq_gemm(a, b_q_weight, b_gptq_qzeros, b_gptq_scales, b_g_idx, use_exllama, use_v2_format, bit)


@alias(
    "vllm",
    "gptq_gemm.in_order(Tensor a, Tensor b_q_weight, Tensor b_gptq_qzeros, Tensor b_gptq_scales, bool use_exllama, "
    "bool use_v2_format, int bit) -> Tensor",
    _gptq_fake,
)
def gptq_gemm_in_order(
    a: Tensor,
    b_q_weight: Tensor,
    b_gptq_qzeros: Tensor,
    b_gptq_scales: Tensor,
    use_exllama: bool,
    use_v2_format: bool,
    bit: int,
) -> Tensor:
    return _gptq_gemm(a, b_q_weight, b_gptq_qzeros, b_gptq_scales, None, use_exllama, use_v2_format, bit)


@alias(
    "sglang",
    "gptq_gemm.sglang(Tensor a, Tensor b_q_weight, Tensor b_gptq_qzeros, Tensor b_gptq_scales, Tensor b_g_idx, "
    "bool use_shuffle, int bit) -> Tensor",
    _gptq_fake,
)
def gptq_gemm_sglang(
    a: Tensor,
    b_q_weight: Tensor,
    b_gptq_qzeros: Tensor,
    b_gptq_scales: Tensor,
    b_g_idx: Tensor,
    use_shuffle: bool,
    bit: int,
) -> Tensor:
    return _gptq_gemm(a, b_q_weight, b_gptq_qzeros, b_gptq_scales, b_g_idx, use_shuffle, False, bit)


@alias("vllm, sglang", "gptq_shuffle(Tensor! q_weight, Tensor q_perm, int bit) -> ()")
def gptq_shuffle(q_weight: Tensor, q_perm: Tensor, bit: int) -> None:
    _check_bits("gptq_shuffle", bit)
    _fits("gptq_shuffle", q_weight.shape[1])
    q_weight.copy_(layouts.pack_gptq(q_weight, bit, _some(q_perm)).reshape(q_weight.shape))


# ---- AWQ ----
def _dequantize_awq(op: str, qweight: Tensor, scales: Tensor, qzeros: Tensor) -> Tensor:
    group = _group(op, len(qweight), len(scales))
    codes = (layouts.in_order(layouts.unpack_cols(qweight, 4), 4) - 8).to(torch.int8)
    zeros = (layouts.in_order(layouts.unpack_cols(qzeros, 4), 4) - 8).to(torch.int8)
    return ops.dequantize(codes, scales.float(), zeros, [group, 1], scales.dtype)


def _awq_fake(qweight: Tensor, scales: Tensor, *_: object) -> Tensor:
    return scales.new_empty((qweight.shape[0], qweight.shape[1] * 8))


@alias(
    "vllm",
    "awq_dequantize(Tensor _kernel, Tensor _scaling_factors, Tensor _zeros, SymInt split_k_iters, int thx, int thy)"
    " -> Tensor",
    _awq_fake,
)
def awq_dequantize(
    _kernel: Tensor, _scaling_factors: Tensor, _zeros: Tensor, split_k_iters: int, thx: int, thy: int
) -> Tensor:
    return _dequantize_awq("awq_dequantize", _kernel, _scaling_factors, _zeros)


@alias("sglang", "awq_dequantize.sglang(Tensor qweight, Tensor scales, Tensor qzeros) -> Tensor", _awq_fake)
def awq_dequantize_sglang(qweight: Tensor, scales: Tensor, qzeros: Tensor) -> Tensor:
    return _dequantize_awq("awq_dequantize", qweight, scales, qzeros)


def _awq_gemm_fake(a: Tensor, kernel: Tensor, *_: object) -> Tensor:
    return a.new_empty((a.shape[0], kernel.shape[1] * 8))


@alias(
    "vllm",
    "awq_gemm(Tensor _in_feats, Tensor _kernel, Tensor _scaling_factors, Tensor _zeros, SymInt split_k_iters)"
    " -> Tensor",
    _awq_gemm_fake,
)
def awq_gemm(
    _in_feats: Tensor, _kernel: Tensor, _scaling_factors: Tensor, _zeros: Tensor, split_k_iters: int
) -> Tensor:
    groups, cols = _scaling_factors.shape
    return ops.wna16_gemm(
        _in_feats,
        packed("awq", _kernel, lambda: layouts.pack_awq(_kernel)),
        _scaling_factors.t().contiguous(),
        4,
        cols,
        _group("awq_gemm", _in_feats.shape[1], groups),
        weight_zero_point=layouts.awq_zero_points(_zeros),
    )


# ---- Marlin ----
def _repack_fake(b_q_weight: Tensor, *args: object) -> Tensor:
    # Sizes are the first of the numbers: after a permutation, or not.
    k, n, bits = [a for a in args if not isinstance(a, Tensor)][:3]
    return b_q_weight.new_empty((k // 16, n * 16 * bits // 32))  # type: ignore[operator]


def _repacked(op: str, weight: Tensor, size_k: int, size_n: int, bits: int) -> Tensor:
    check(op, size_k % 16 == 0, lambda: f"size_k must be a multiple of 16, got {size_k}")
    return weight.reshape(size_k // 16, size_n * 16 * bits // 32)


def _gptq_repack(qweight: Tensor, perm: Tensor | None, k: int, n: int, bits: int, is_a_8bit: bool) -> Tensor:
    op = "gptq_marlin_repack"
    _check_bits(op, bits)
    _fits(op, n)
    check(op, not is_a_8bit, lambda: "is_a_8bit: products of 8-bit activations are not offered by marlin_gemm")
    check(
        op,
        tuple(qweight.shape) == (k * bits // 32, n),
        lambda: f"b_q_weight must be [{k * bits // 32}, {n}], got {list(qweight.shape)}",
    )
    return _repacked(op, layouts.pack_gptq(qweight, bits, _some(perm)), k, n, bits)


@alias(
    "vllm",
    "gptq_marlin_repack(Tensor b_q_weight, Tensor perm, SymInt size_k, SymInt size_n, int num_bits, bool is_a_8bit)"
    " -> Tensor",
    _repack_fake,
)
def gptq_marlin_repack(
    b_q_weight: Tensor, perm: Tensor, size_k: int, size_n: int, num_bits: int, is_a_8bit: bool
) -> Tensor:
    return _gptq_repack(b_q_weight, perm, size_k, size_n, num_bits, is_a_8bit)


@alias(
    "vllm",
    "gptq_marlin_repack.in_order(Tensor b_q_weight, SymInt size_k, SymInt size_n, int num_bits, bool is_a_8bit)"
    " -> Tensor",
    _repack_fake,
)
def gptq_marlin_repack_in_order(b_q_weight: Tensor, size_k: int, size_n: int, num_bits: int, is_a_8bit: bool) -> Tensor:
    return _gptq_repack(b_q_weight, None, size_k, size_n, num_bits, is_a_8bit)


@alias(
    "sglang",
    "gptq_marlin_repack.sglang(Tensor b_q_weight, Tensor perm, int size_k, int size_n, int num_bits) -> Tensor",
    _repack_fake,
)
def gptq_marlin_repack_sglang(b_q_weight: Tensor, perm: Tensor, size_k: int, size_n: int, num_bits: int) -> Tensor:
    return _gptq_repack(b_q_weight, perm, size_k, size_n, num_bits, False)


def _awq_repack(qweight: Tensor, k: int, n: int, bits: int, is_a_8bit: bool) -> Tensor:
    op = "awq_marlin_repack"
    _check_bits(op, bits)
    _fits(op, n)
    check(op, not is_a_8bit, lambda: "is_a_8bit: products of 8-bit activations are not offered by marlin_gemm")
    check(
        op,
        tuple(qweight.shape) == (k, n * bits // 32),
        lambda: f"b_q_weight must be [{k}, {n * bits // 32}], got {list(qweight.shape)}",
    )
    return _repacked(op, layouts.pack_awq(qweight, bits), k, n, bits)


@alias(
    "vllm",
    "awq_marlin_repack(Tensor b_q_weight, SymInt size_k, SymInt size_n, int num_bits, bool is_a_8bit) -> Tensor",
    _repack_fake,
)
def awq_marlin_repack(b_q_weight: Tensor, size_k: int, size_n: int, num_bits: int, is_a_8bit: bool) -> Tensor:
    return _awq_repack(b_q_weight, size_k, size_n, num_bits, is_a_8bit)


@alias(
    "sglang",
    "awq_marlin_repack.sglang(Tensor b_q_weight, int size_k, int size_n, int num_bits) -> Tensor",
    _repack_fake,
)
def awq_marlin_repack_sglang(b_q_weight: Tensor, size_k: int, size_n: int, num_bits: int) -> Tensor:
    return _awq_repack(b_q_weight, size_k, size_n, num_bits, False)


def _marlin_fake(a: Tensor, *args: object) -> Tensor:
    numbers = [v for v in args if not isinstance(v, Tensor | bool) and v is not None]
    return a.new_empty((a.shape[0], numbers[2]))  # type: ignore[arg-type]  # after the type and size_m


@alias(
    "vllm",
    "marlin_gemm(Tensor a, Tensor? c_or_none, Tensor b_q_weight, Tensor? b_bias_or_none, Tensor b_scales, "
    "Tensor? a_scales, Tensor? global_scale, Tensor? b_zeros_or_none, Tensor? g_idx_or_none, Tensor? perm_or_none, "
    "Tensor workspace, int b_type_id, SymInt size_m, SymInt size_n, SymInt size_k, bool is_k_full, "
    "bool use_atomic_add, bool use_fp32_reduce, bool is_zp_float) -> Tensor",
    _marlin_fake,
)
def marlin_gemm(
    a: Tensor,
    c_or_none: Tensor | None,
    b_q_weight: Tensor,
    b_bias_or_none: Tensor | None,
    b_scales: Tensor,
    a_scales: Tensor | None,
    global_scale: Tensor | None,
    b_zeros_or_none: Tensor | None,
    g_idx_or_none: Tensor | None,
    perm_or_none: Tensor | None,
    workspace: Tensor,
    b_type_id: int,
    size_m: int,
    size_n: int,
    size_k: int,
    is_k_full: bool,
    use_atomic_add: bool,
    use_fp32_reduce: bool,
    is_zp_float: bool,
) -> Tensor:
    op = "marlin_gemm"
    kind = _MARLIN_TYPES.get(b_type_id)
    check(op, kind is not None, lambda: f"b_type_id must be that of u4, u4b8 or u8b128, got {b_type_id}")
    assert kind is not None
    bits, with_zeros = kind
    zeros, perm = _some_tensor(b_zeros_or_none), _some(perm_or_none)
    for name, value in (("a_scales", a_scales), ("global_scale", global_scale), ("c_or_none", c_or_none)):
        check(op, _some_tensor(value) is None, lambda name=name: f"{name} is not offered, give None")  # type: ignore[misc]
    check(op, not is_zp_float, lambda: "zero points that are not integers are not offered")
    check(op, with_zeros == (zeros is not None), lambda: "u4 goes with b_zeros, the other types go without")
    check(op, is_k_full or perm is None, lambda: "columns in GPTQ's order need all of K: is_k_full")
    bias = _some_tensor(b_bias_or_none)
    _fits(op, size_n)
    return ops.wna16_gemm(
        a,
        b_q_weight.reshape(size_n // 64, -1, 64),
        layouts.marlin_scales(b_scales),
        bits,
        size_n,
        _group(op, size_k, len(b_scales)),
        weight_zero_point=None if zeros is None else layouts.marlin_zero_points(zeros, bits),
        perm=perm,
        bias=None if bias is None else layouts.marlin_row(bias),
    )


def _some_tensor(value: Tensor | None) -> Tensor | None:
    return None if value is None or value.numel() == 0 else value


@alias(
    "vllm",
    "marlin_gemm.in_order(Tensor a, Tensor? c_or_none, Tensor b_q_weight, Tensor? b_bias_or_none, Tensor b_scales, "
    "Tensor? a_scales, Tensor? global_scale, Tensor? b_zeros_or_none, Tensor workspace, int b_type_id, SymInt size_m, "
    "SymInt size_n, SymInt size_k, bool use_atomic_add, bool use_fp32_reduce, bool is_zp_float) -> Tensor",
    _marlin_fake,
)
def marlin_gemm_in_order(
    a: Tensor,
    c_or_none: Tensor | None,
    b_q_weight: Tensor,
    b_bias_or_none: Tensor | None,
    b_scales: Tensor,
    a_scales: Tensor | None,
    global_scale: Tensor | None,
    b_zeros_or_none: Tensor | None,
    workspace: Tensor,
    b_type_id: int,
    size_m: int,
    size_n: int,
    size_k: int,
    use_atomic_add: bool,
    use_fp32_reduce: bool,
    is_zp_float: bool,
) -> Tensor:
    y: Tensor = marlin_gemm(
        a,
        c_or_none,
        b_q_weight,
        b_bias_or_none,
        b_scales,
        a_scales,
        global_scale,
        b_zeros_or_none,
        None,
        None,
        workspace,
        b_type_id,
        size_m,
        size_n,
        size_k,
        True,
        use_atomic_add,
        use_fp32_reduce,
        is_zp_float,
    )
    return y


# ---- vLLM's CPU, and what is left ----
@alias(
    "vllm",
    "cpu_gemm_wna16(Tensor input, Tensor q_weight, Tensor(a2!) output, Tensor scales, Tensor? zeros, Tensor? bias, "
    "SymInt pack_factor, str isa_hint) -> ()",
)
def cpu_gemm_wna16(
    input: Tensor,
    q_weight: Tensor,
    output: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    pack_factor: int,
    isa_hint: str,
) -> None:
    op = "cpu_gemm_wna16"
    check(op, pack_factor == 8, lambda: f"pack_factor must be 8, codes of 4 bits, got {pack_factor}")
    groups, cols = scales.shape
    y = ops.wna16_gemm(
        input,
        packed("cpu_wna16", q_weight, lambda: layouts.pack_cpu(q_weight)),
        scales.t().contiguous(),
        4,
        cols,
        _group(op, input.shape[1], groups),
        weight_zero_point=None if zeros is None else layouts.signed(layouts.unpack_cols(zeros, 4), 4),
        bias=bias,
    )
    output.copy_(y)


@alias(
    "vllm",
    "permute_cols(Tensor A, Tensor perm) -> Tensor",
    lambda A, perm: A.new_empty((A.shape[0], perm.shape[0])),
)
def permute_cols(A: Tensor, perm: Tensor) -> Tensor:
    return A.index_select(1, perm)


@alias(
    "vllm",
    "moe_wna16_gemm.vllm(Tensor input, Tensor! output, Tensor b_qweight, Tensor b_scales, Tensor? b_qzeros, "
    "Tensor? topk_weights, Tensor sorted_token_ids, Tensor expert_ids, Tensor num_tokens_post_pad, int top_k, "
    "int BLOCK_SIZE_M, int BLOCK_SIZE_N, int BLOCK_SIZE_K, int bit) -> ()",
)
def moe_wna16_gemm(
    input: Tensor,
    output: Tensor,
    b_qweight: Tensor,
    b_scales: Tensor,
    b_qzeros: Tensor | None,
    topk_weights: Tensor | None,
    sorted_token_ids: Tensor,
    expert_ids: Tensor,
    num_tokens_post_pad: Tensor,
    top_k: int,
    BLOCK_SIZE_M: int,
    BLOCK_SIZE_N: int,
    BLOCK_SIZE_K: int,
    bit: int,
) -> None:
    """Blocks of rows say which expert a row has; quantkit's op wants the rows sorted by expert. Each has one."""
    op = "moe_wna16_gemm"
    _check_bits(op, bit)
    experts, cols, groups = b_scales.shape
    depth, rows = b_qweight.shape[2] * 8 // bit, input.shape[0] * top_k
    ids = sorted_token_ids.long()
    place = torch.arange(len(ids), device=ids.device)
    expert = expert_ids.long()[place // BLOCK_SIZE_M]
    used = (ids < rows) & (place < num_tokens_post_pad.long())
    # What pads a block goes to a row of its own behind the others.
    of_row = expert.new_full((rows + 1,), experts).scatter_(0, torch.where(used, ids, rows), expert)[:rows]
    order, offsets = ops.sort_by_expert(of_row.unsqueeze(1), experts)

    def pack() -> Tensor:
        return torch.stack([ops.pack_wna16(e.contiguous().view(torch.int32), bit, depth) for e in b_qweight])

    zero_point = None
    if b_qzeros is not None:
        zeros = b_qzeros.to(torch.int32)
        if bit == 4:  # two channels in a byte
            zeros = torch.stack((zeros & 15, zeros >> 4), 2).flatten(1, 2)
        zero_point = (zeros - (1 << (bit - 1))).to(torch.int8).contiguous()
    y = ops.moe_gemm(
        "wna16",
        input[order // top_k],
        offsets,
        packed("moe_wna16", b_qweight, pack),
        b_scales.contiguous(),
        cols,
        num_bits=bit,
        group_size=_group(op, depth, groups),
        weight_zero_point=zero_point,
        row_scale=None if topk_weights is None else topk_weights.reshape(-1).float()[order],
    )
    output.view(rows, cols)[order] = y.to(output.dtype)
