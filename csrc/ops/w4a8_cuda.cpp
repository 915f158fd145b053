// w4a8_gemm and moe_w4a8_gemm on CUDA.
#include "ops/gemm_cuda.h"

namespace qk::cuda {
namespace ops {
namespace {

// All arguments are checked. Groups of `group` columns share a scale.
Tensor w4a8_product(const char* op, const Tensor& x, const Tensor& packed,
                    const Tensor& weight_scale, int64_t out_features, int64_t group,
                    const OptionalTensor& weight_zero_point, const OptionalTensor& bias,
                    const ExpertRows& rows) {
  const Tensor out = new_tensor(x, {x.size(0), out_features}, x.scalar_type());
  if (out.numel() == 0) return out;
  const int64_t cols = x.size(1), groups = cols > 0 ? cols / group : 0;
  GemmArgs args = gemm_args(op, x, out, packed, (cols + 7) / 8, bias, rows);
  check_same_device(op, "weight_scale", weight_scale, x);
  if (weight_zero_point) check_same_device(op, "weight_zero_point", *weight_zero_point, x);
  const int64_t row_bytes = row_bytes_of(cols);
  const Tensor codes = new_tensor(x, {x.size(0), row_bytes}, ScalarType::Char);
  const Tensor scale = new_tensor(x, {x.size(0)}, ScalarType::Float);
  const Tensor sums = new_tensor(x, {weight_zero_point ? x.size(0) * groups : 0}, ScalarType::Int);
  Int8Rows how = {};
  how.x = float_matrix(op, x);
  how.symmetric = true;
  how.codes = data<int8_t>(codes);
  how.row_bytes = row_bytes;
  how.row_scale = data<float>(scale);
  how.sums = weight_zero_point ? data<int32_t>(sums) : nullptr;
  how.groups = static_cast<int>(groups);
  how.group = static_cast<int>(group);
  check_launch(op, int8_rows(how, current_stream(x)));
  args.a.data = codes.const_data_ptr();
  args.a.row_bytes = row_bytes;
  args.scales.input = how.row_scale;
  args.groups.data = weight_scale.const_data_ptr();
  args.groups.dtype = dtype_of(op, weight_scale.scalar_type());
  args.groups.zero_point = pointer<int8_t>(weight_zero_point);
  args.groups.rows = 1;
  args.groups.groups = static_cast<int>(groups);
  args.groups.columns = static_cast<int>(group > 0 ? group : 1);
  args.groups.by_panels = weight_scale.dim() == (rows ? 4 : 3);
  args.groups.expert_scales = rows ? weight_scale.numel() / rows.count() : 0;
  args.groups.input_sums = how.sums;
  args.groups.segment = groups > 1 ? args.groups.columns : 0;
  run_gemm(op, WeightKind::kInt4ByInt8, DType::kInt8, args, x);
  return out;
}

Tensor w4a8_gemm(const Tensor& x, const Tensor& packed, const Tensor& weight_scale,
                 int64_t out_features, int64_t group_size, const OptionalTensor& weight_zero_point,
                 const OptionalTensor& bias) {
  constexpr auto kOp = "w4a8_gemm";
  const int64_t group = check_w4a8_gemm(kOp, x, packed, weight_scale, out_features, group_size,
                                        weight_zero_point, bias);
  const auto guard = use_device_of(x);
  return w4a8_product(kOp, x, packed, weight_scale, out_features, group, weight_zero_point, bias,
                      {});
}

Tensor moe_w4a8_gemm(const Tensor& x, const Tensor& offsets, const Tensor& packed,
                     const Tensor& weight_scale, int64_t out_features, int64_t group_size,
                     const OptionalTensor& weight_zero_point, const OptionalTensor& bias,
                     const OptionalTensor& row_scale) {
  constexpr auto kOp = "moe_w4a8_gemm";
  const ExpertRows rows{offsets, row_scale};
  check_experts(kOp, x, rows, out_features);
  check_stack(kOp, "packed", packed, rows);
  check_stack(kOp, "weight_scale", weight_scale, rows);
  check_stack(kOp, "weight_zero_point", weight_zero_point, rows);
  check_stack(kOp, "bias", bias, rows);
  int64_t group = 0;
  if (rows.count() > 0) {
    group =
        check_w4a8_gemm("w4a8_gemm", x, first_part(packed), first_part(weight_scale), out_features,
                        group_size, first_part(weight_zero_point), first_part(bias));
  }
  const auto guard = use_device_of(x);
  return w4a8_product(kOp, x, packed, weight_scale, out_features, group, weight_zero_point, bias,
                      rows);
}

}  // namespace
}  // namespace ops
}  // namespace qk::cuda

QUANTKIT_CUDA_OPS(m) {
  m.impl("w4a8_gemm", TORCH_BOX(&qk::cuda::ops::w4a8_gemm));
  m.impl("moe_w4a8_gemm", TORCH_BOX(&qk::cuda::ops::moe_w4a8_gemm));
}
