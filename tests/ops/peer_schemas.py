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
}
# Where a peer does not say which arguments it writes to, or says so of ones that it reads. quantkit tells the truth,
# or torch.compile would reorder the writes; a caller sees no difference.
WRITES = {
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
}
