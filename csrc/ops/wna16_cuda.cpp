// wna16_gemm, moe_wna16_gemm and bf16_gemm on CUDA.
#include "ops/gemm_cuda.h"

namespace qk::cuda {
namespace ops {
namespace {

// All arguments are checked. `groups` of columns share a scale.
Tensor wna16_product(const char* op, const Tensor& x, const Tensor& packed,
                     const Tensor& weight_scale, const OptionalTensor& weight_zero_point,
                     const OptionalTensor& perm, const OptionalTensor& bias, int64_t num_bits,
                     int64_t out_features, int64_t groups, const ExpertRows& rows) {
  const Tensor out = new_tensor(x, {x.size(0), out_features}, x.scalar_type());
  if (out.numel() == 0) return out;
  GemmArgs args = gemm_args(op, x, out, packed, (x.size(1) * num_bits + 31) / 32, bias, rows);
  check_same_device(op, "weight_scale", weight_scale, x);
  if (weight_zero_point) check_same_device(op, "weight_zero_point", *weight_zero_point, x);
  if (perm) check_same_device(op, "perm", *perm, x);
  const WeightKind kind = num_bits == 4 ? WeightKind::kInt4 : WeightKind::kByte;
  args.groups.data = weight_scale.const_data_ptr();
  args.groups.dtype = dtype_of(op, weight_scale.scalar_type());
  args.groups.zero_point = pointer<int8_t>(weight_zero_point);
  args.groups.rows = 1;
  args.groups.groups = static_cast<int>(groups);
  args.groups.columns = static_cast<int>(x.size(1) / groups);
  args.groups.by_panels = weight_scale.dim() == (rows ? 4 : 3);
  args.groups.expert_scales = rows ? weight_scale.numel() / rows.count() : 0;
  args.groups.segment = groups == 1 ? 0 : args.groups.columns;
  const StagedInput staged = stage_input(op, x, kind, perm, rows, args);
  run_gemm(op, kind, staged.dtype, args, x);
  return out;
}

Tensor wna16_gemm(const Tensor& x, const Tensor& packed, const Tensor& weight_scale,
                  const OptionalTensor& weight_zero_point, const OptionalTensor& perm,
                  const OptionalTensor& bias, int64_t num_bits, int64_t out_features,
                  int64_t group_size) {
  constexpr auto kOp = "wna16_gemm";
  const int64_t groups = check_wna16_weight(kOp, x, packed, weight_scale, weight_zero_point,
                                            num_bits, out_features, group_size);
  if (perm) check_perm_shape(kOp, *perm, x.size(1));
  check_plain_bias(kOp, bias, x, out_features);
  const auto guard = use_device_of(x);
  return wna16_product(kOp, x, packed, weight_scale, weight_zero_point, perm, bias, num_bits,
                       out_features, groups, {});
}

Tensor moe_wna16_gemm(const Tensor& x, const Tensor& offsets, const Tensor& packed,
                      const Tensor& weight_scale, int64_t out_features, int64_t num_bits,
                      int64_t group_size, const OptionalTensor& weight_zero_point,
                      const OptionalTensor& perm, const OptionalTensor& bias,
                      const OptionalTensor& row_scale) {
  constexpr auto kOp = "moe_wna16_gemm", kSingle = "wna16_gemm";
  const ExpertRows rows{offsets, row_scale};
  check_experts(kOp, x, rows, out_features);
  check_stack(kOp, "packed", packed, rows);
  check_stack(kOp, "weight_scale", weight_scale, rows);
  check_stack(kOp, "weight_zero_point", weight_zero_point, rows);
  check_stack(kOp, "perm", perm, rows);
  check_stack(kOp, "bias", bias, rows);
  int64_t groups = 1;
  if (rows.count() > 0) {
    groups = check_wna16_weight(kSingle, x, first_part(packed), first_part(weight_scale),
                                first_part(weight_zero_point), num_bits, out_features, group_size);
    if (perm) check_perm_shape(kSingle, first_part(*perm), x.size(1));
    check_plain_bias(kSingle, first_part(bias), x, out_features);
  }
  const auto guard = use_device_of(x);
  return wna16_product(kOp, x, packed, weight_scale, weight_zero_point, perm, bias, num_bits,
                       out_features, groups, rows);
}

Tensor bf16_gemm(const Tensor& x, const Tensor& packed, const OptionalTensor& bias,
                 int64_t out_features) {
  constexpr auto kOp = "bf16_gemm";
  check_bf16_gemm(kOp, x, packed, out_features);
  check_plain_bias(kOp, bias, x, out_features);
  const auto guard = use_device_of(x);
  const Tensor out = new_tensor(x, {x.size(0), out_features}, x.scalar_type());
  if (out.numel() == 0) return out;
  const ExpertRows all;
  GemmArgs args = gemm_args(kOp, x, out, packed, (x.size(1) + 1) / 2, bias, all);
  const StagedInput staged = stage_input(kOp, x, WeightKind::kBFloat16, std::nullopt, all, args);
  run_gemm(kOp, WeightKind::kBFloat16, staged.dtype, args, x);
  return out;
}

}  // namespace
}  // namespace ops
}  // namespace qk::cuda

QUANTKIT_CUDA_OPS(m) {
  m.impl("wna16_gemm", TORCH_BOX(&qk::cuda::ops::wna16_gemm));
  m.impl("moe_wna16_gemm", TORCH_BOX(&qk::cuda::ops::moe_wna16_gemm));
  m.impl("bf16_gemm", TORCH_BOX(&qk::cuda::ops::bf16_gemm));
}
