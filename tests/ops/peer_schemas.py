"""The schemas of vLLM's and sgl-kernel's ops as their own sources have them, for those that quantkit offers.

vLLM: torch_bindings.cpp in csrc/libtorch_stable, csrc/moe and csrc/cpu, of 2025 and 2026.
SGLang: sgl-kernel/csrc/common_extension.cc and csrc/cpu/torch_extension_cpu.cpp.
"""

from __future__ import annotations

# By the name here (an overload's after the dot where two peers, or years, have one name for different arguments).
VLLM = {
    "static_scaled_fp8_quant": "static_scaled_fp8_quant(Tensor! result, Tensor input, Tensor scale, "
    "int[]? group_shape=None) -> ()",
    "dynamic_scaled_fp8_quant": "dynamic_scaled_fp8_quant(Tensor! result, Tensor input, Tensor! scale) -> ()",
    "dynamic_per_token_scaled_fp8_quant": "dynamic_per_token_scaled_fp8_quant(Tensor! result, Tensor input, "
    "Tensor! scale, Tensor? scale_ub) -> ()",
    "static_scaled_int8_quant": "static_scaled_int8_quant(Tensor! result, Tensor input, Tensor scale,Tensor? azp)"
    " -> ()",
    "dynamic_scaled_int8_quant": "dynamic_scaled_int8_quant(Tensor! result, Tensor input, Tensor! scale, Tensor!? azp)"
    " -> ()",
    "per_token_group_fp8_quant": "per_token_group_fp8_quant(Tensor input, Tensor! output_q, Tensor! output_s, "
    "int group_size, float eps, float fp8_min, float fp8_max, bool scale_ue8m0, bool dummy_is_scale_transposed, "
    "bool dummy_is_tma_aligned ) -> ()",
    "per_token_group_quant_int8": "per_token_group_quant_int8(Tensor input, Tensor! output_q, Tensor! output_s, "
    "int group_size, float eps, float int8_min, float int8_max) -> ()",
    "scaled_fp4_quant": "scaled_fp4_quant(Tensor input, Tensor input_scale, bool is_sf_swizzled_layout)"
    " -> (Tensor, Tensor)",
    "scaled_fp4_quant.out": "scaled_fp4_quant.out(Tensor input, Tensor input_scale, bool is_sf_swizzled_layout, *, "
    "Tensor(a!) output, Tensor(b!) output_scale) -> ()",
    "silu_and_mul": "silu_and_mul(Tensor! out, Tensor input) -> ()",
    "silu_and_mul_nvfp4_quant": "silu_and_mul_nvfp4_quant(Tensor! result, Tensor! result_block_scale, Tensor input, "
    "Tensor input_global_scale) -> ()",
    "silu_and_mul_quant": "silu_and_mul_quant(Tensor! result, Tensor input, Tensor scale) -> ()",
    "silu_and_mul_per_block_quant": "silu_and_mul_per_block_quant(Tensor! out, Tensor input, Tensor! scales, "
    "int group_size, Tensor? scale_ub=None, bool is_scale_transposed=False) -> ()",
    "fused_add_rms_norm": "fused_add_rms_norm(Tensor! input, Tensor! residual, Tensor? weight, float epsilon) -> ()",
    "rms_norm_static_fp8_quant": "rms_norm_static_fp8_quant(Tensor! result, Tensor input, Tensor weight, Tensor scale, "
    "float epsilon) -> ()",
    "fused_add_rms_norm_static_fp8_quant": "fused_add_rms_norm_static_fp8_quant(Tensor! result, Tensor input, "
    "Tensor! residual, Tensor weight, Tensor scale, float epsilon) -> ()",
    "rms_norm_dynamic_per_token_quant": "rms_norm_dynamic_per_token_quant(Tensor! result, Tensor input, Tensor weight, "
    "Tensor! scale, float epsilon, Tensor? scale_ub, Tensor!? residual) -> ()",
    "rms_norm_per_block_quant": "rms_norm_per_block_quant(Tensor! result, Tensor input, Tensor weight, Tensor! scale, "
    "float epsilon, Tensor? scale_ub, Tensor!? residual, int group_size, bool is_scale_transposed) -> ()",
    "cutlass_scaled_mm": "cutlass_scaled_mm(Tensor! out, Tensor a, Tensor b, Tensor a_scales, Tensor b_scales, "
    "Tensor? bias) -> ()",
    "cutlass_scaled_mm_azp": "cutlass_scaled_mm_azp(Tensor! out, Tensor a, Tensor b, Tensor a_scales, Tensor b_scales, "
    "Tensor azp_adj, Tensor? azp, Tensor? bias) -> ()",
    "cutlass_scaled_mm_supports_fp8": "cutlass_scaled_mm_supports_fp8(int cuda_device_capability) -> bool",
    "cutlass_scaled_mm_supports_block_fp8": "cutlass_scaled_mm_supports_block_fp8(int cuda_device_capability) -> bool",
    "cutlass_scaled_mm_supports_fp4": "cutlass_scaled_mm_supports_fp4(int cuda_device_capability) -> bool",
    "cutlass_scaled_fp4_mm": "cutlass_scaled_fp4_mm(Tensor! out, Tensor a, Tensor b, Tensor block_scale_a, "
    "Tensor block_scale_b, Tensor alpha) -> ()",
    "gptq_gemm": "gptq_gemm(Tensor a, Tensor b_q_weight, Tensor b_gptq_qzeros, Tensor b_gptq_scales, Tensor b_g_idx, "
    "bool use_exllama, bool use_v2_format, int bit) -> Tensor",
    "gptq_shuffle": "gptq_shuffle(Tensor! q_weight, Tensor q_perm, int bit) -> ()",
    "awq_dequantize": "awq_dequantize(Tensor _kernel, Tensor _scaling_factors, Tensor _zeros, SymInt split_k_iters, "
    "int thx, int thy) -> Tensor",
    "awq_gemm": "awq_gemm(Tensor _in_feats, Tensor _kernel, Tensor _scaling_factors, Tensor _zeros, "
    "SymInt split_k_iters) -> Tensor",
    "gptq_marlin_repack": "gptq_marlin_repack(Tensor b_q_weight, Tensor perm, SymInt size_k, SymInt size_n, "
    "int num_bits, bool is_a_8bit) -> Tensor",
    "awq_marlin_repack": "awq_marlin_repack(Tensor b_q_weight, SymInt size_k, SymInt size_n, int num_bits, "
    "bool is_a_8bit) -> Tensor",
    "marlin_gemm": "marlin_gemm(Tensor a, Tensor? c_or_none, Tensor b_q_weight, Tensor? b_bias_or_none,"
    "Tensor b_scales, Tensor? a_scales, Tensor? global_scale, Tensor? b_zeros_or_none, Tensor? g_idx_or_none, "
    "Tensor? perm_or_none, Tensor workspace, int b_type_id, SymInt size_m, SymInt size_n, SymInt size_k, "
    "bool is_k_full, bool use_atomic_add, bool use_fp32_reduce, bool is_zp_float) -> Tensor",
    # As vLLM 0.32 calls them in _custom_ops.py, which no longer knows GPTQ's order of columns.
    "gptq_gemm.in_order": "gptq_gemm(Tensor a, Tensor b_q_weight, Tensor b_gptq_qzeros, Tensor b_gptq_scales, "
    "bool use_exllama, bool use_v2_format, int bit) -> Tensor",
    "gptq_marlin_repack.in_order": "gptq_marlin_repack(Tensor b_q_weight, SymInt size_k, SymInt size_n, int num_bits, "
    "bool is_a_8bit) -> Tensor",
    "marlin_gemm.in_order": "marlin_gemm(Tensor a, Tensor? c_or_none, Tensor b_q_weight, Tensor? b_bias_or_none, "
    "Tensor b_scales, Tensor? a_scales, Tensor? global_scale, Tensor? b_zeros_or_none, Tensor workspace, "
    "int b_type_id, SymInt size_m, SymInt size_n, SymInt size_k, bool use_atomic_add, bool use_fp32_reduce, "
    "bool is_zp_float) -> Tensor",
    "permute_cols": "permute_cols(Tensor A, Tensor perm) -> Tensor",
    "moe_wna16_gemm.vllm": "moe_wna16_gemm(Tensor input, Tensor! output, Tensor b_qweight, Tensor b_scales, "
    "Tensor? b_qzeros, Tensor? topk_weights, Tensor sorted_token_ids, Tensor expert_ids, Tensor num_tokens_post_pad, "
    "int top_k, int BLOCK_SIZE_M, int BLOCK_SIZE_N, int BLOCK_SIZE_K, int bit) -> ()",
    "reshape_and_cache_flash": "reshape_and_cache_flash(Tensor key, Tensor value, Tensor! key_cache, "
    "Tensor! value_cache, Tensor slot_mapping, str kv_cache_dtype, Tensor k_scale, Tensor v_scale) -> ()",
    "convert_fp8": "convert_fp8(Tensor! dst_cache, Tensor src_cache, float scale, str kv_cache_dtype) -> ()",
    # On CPUs.
    "cpu_gemm_wna16": "cpu_gemm_wna16(Tensor input, Tensor q_weight, Tensor(a2!) output, Tensor scales, Tensor? zeros, "
    "Tensor? bias, SymInt pack_factor, str isa_hint) -> ()",
    "create_onednn_scaled_mm_handler": "create_onednn_scaled_mm_handler(Tensor b, Tensor b_scales, "
    "ScalarType output_type, bool dynamic_act_quant, bool use_azp, int primitive_cache_size) -> int",
    "onednn_scaled_mm": "onednn_scaled_mm(Tensor! c, Tensor a, Tensor a_scales, Tensor? azp, Tensor? azp_adj, "
    "Tensor? bias, Tensor handler_tensor) -> ()",
    "release_dnnl_matmul_handler": "release_dnnl_matmul_handler(int handler) -> ()",
    "convert_weight_packed": "convert_weight_packed(Tensor! weight) -> Tensor",
    "int8_scaled_mm_with_quant": "int8_scaled_mm_with_quant(Tensor mat1, Tensor mat2, Tensor scales2, Tensor? bias, "
    "ScalarType out_dtype, bool is_vnni) -> Tensor",
    "fp8_scaled_mm_cpu": "fp8_scaled_mm_cpu(Tensor(a0!) mat1, Tensor(a1!) mat2, Tensor(a2!) scales2, "
    "SymInt[] block_size, Tensor? bias, ScalarType out_dtype, bool is_vnni) -> Tensor",
}
SGLANG = {
    "rmsnorm": "rmsnorm(Tensor! output, Tensor input, Tensor weight, float eps, bool enable_pdl) -> ()",
    "fused_add_rmsnorm": "fused_add_rmsnorm(Tensor! input, Tensor! residual, Tensor weight, float eps, "
    "bool enable_pdl) -> ()",
    "silu_and_mul": "silu_and_mul(Tensor! out, Tensor input) -> ()",
    "int8_scaled_mm": "int8_scaled_mm(Tensor mat_a, Tensor mat_b, Tensor scales_a, Tensor scales_b, "
    "ScalarType out_dtype, Tensor? bias) -> Tensor",
    "fp8_scaled_mm": "fp8_scaled_mm(Tensor mat_a, Tensor mat_b, Tensor scales_a, Tensor scales_b, "
    "ScalarType out_dtype, Tensor? bias) -> Tensor",
    "fp8_blockwise_scaled_mm": "fp8_blockwise_scaled_mm(Tensor mat_a, Tensor mat_b, Tensor scales_a, Tensor scales_b, "
    "ScalarType out_dtype) -> Tensor",
    "sgl_per_token_group_quant_8bit": "sgl_per_token_group_quant_8bit(Tensor input, Tensor output_q, Tensor output_s, "
    "int group_size, float eps, float fp8_min, float fp8_max, bool scale_ue8m0) -> ()",
    "sgl_per_token_group_quant_8bit_v2": "sgl_per_token_group_quant_8bit_v2(Tensor input, Tensor output_q, "
    "Tensor output_s, int group_size, float eps, float fp8_min, float fp8_max, bool scale_ue8m0, "
    "bool fuse_silu_and_mul, Tensor? masked_m) -> ()",
    "sgl_per_token_group_quant_fp8": "sgl_per_token_group_quant_fp8(Tensor input, Tensor output_q, Tensor output_s, "
    "int group_size, float eps, float fp8_min, float fp8_max, bool scale_ue8m0) -> ()",
    "sgl_per_token_group_quant_int8": "sgl_per_token_group_quant_int8(Tensor input, Tensor output_q, Tensor output_s, "
    "int group_size, float eps, float int8_min, float int8_max) -> ()",
    "sgl_per_tensor_quant_fp8": "sgl_per_tensor_quant_fp8(Tensor input, Tensor output_q, Tensor output_s, "
    "bool is_static) -> ()",
    "sgl_per_token_quant_fp8": "sgl_per_token_quant_fp8(Tensor input, Tensor output_q, Tensor output_s) -> ()",
    "per_token_quant_int8_cpu": "per_token_quant_int8_cpu(Tensor A) -> (Tensor, Tensor)",
    "scaled_fp4_quant.sglang": "scaled_fp4_quant(Tensor! output, Tensor! input, Tensor! output_scale, "
    "Tensor! input_scale) -> ()",
    "cutlass_scaled_fp4_mm": "cutlass_scaled_fp4_mm(Tensor! out, Tensor a, Tensor b, Tensor block_scale_a, "
    "Tensor block_scale_b, Tensor alpha) -> ()",
    "gptq_gemm.sglang": "gptq_gemm(Tensor a, Tensor b_q_weight, Tensor b_gptq_qzeros, Tensor b_gptq_scales, "
    "Tensor b_g_idx, bool use_shuffle, int bit) -> Tensor",
    "gptq_shuffle": "gptq_shuffle(Tensor! q_weight, Tensor q_perm, int bit) -> ()",
    "awq_dequantize.sglang": "awq_dequantize(Tensor qweight, Tensor scales, Tensor qzeros) -> Tensor",
    "gptq_marlin_repack.sglang": "gptq_marlin_repack(Tensor! b_q_weight, Tensor! perm, int size_k, int size_n, "
    "int num_bits) -> Tensor",
    "awq_marlin_repack.sglang": "awq_marlin_repack(Tensor! b_q_weight, int size_k, int size_n, int num_bits) -> Tensor",
    "convert_weight_packed": "convert_weight_packed(Tensor weight) -> Tensor",
    "weight_packed_linear": "weight_packed_linear(Tensor mat1, Tensor mat2, Tensor? bias, bool is_vnni) -> Tensor",
    "int8_scaled_mm_cpu": "int8_scaled_mm_cpu(Tensor mat1, Tensor mat2, Tensor scales1, Tensor scales2, Tensor? bias, "
    "ScalarType out_dtype, bool is_vnni) -> Tensor",
    "int8_scaled_mm_with_quant": "int8_scaled_mm_with_quant(Tensor mat1, Tensor mat2, Tensor scales2, Tensor? bias, "
    "ScalarType out_dtype, bool is_vnni) -> Tensor",
    "fp8_scaled_mm_cpu": "fp8_scaled_mm_cpu(Tensor mat1, Tensor mat2, Tensor scales2, int[] block_size, Tensor? bias, "
    "ScalarType out_dtype, bool is_vnni) -> Tensor",
}
# Where a peer does not say which arguments it writes to, or says so of ones that it reads. quantkit tells the truth,
# or torch.compile would reorder the writes; a caller sees no difference.
WRITES: dict[str, set[str]] = {
    **{
        f"sgl_per_{kind}": {"output_q", "output_s"}
        for kind in (
            "token_group_quant_8bit",
            "token_group_quant_8bit_v2",
            "token_group_quant_fp8",
            "token_group_quant_int8",
            "tensor_quant_fp8",
            "token_quant_fp8",
        )
    },
    "scaled_fp4_quant.sglang": {"output", "output_scale"},
    **{
        name: set()
        for name in (
            "convert_weight_packed",
            "fp8_scaled_mm_cpu",
            "gptq_marlin_repack.sglang",
            "awq_marlin_repack.sglang",
        )
    },
}
