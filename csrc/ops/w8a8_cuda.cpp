// int8_gemm, w8a8_gemm, int8_mixed_gemm and moe_w8a8_gemm on CUDA: rows become int8 codes, then
// these are multiplied.
#include "ops/gemm_cuda.h"

namespace qk::cuda {
namespace ops {
namespace {

// What the codes of x are made with; all may be missing.
struct Int8Input {
  const OptionalTensor &scale, &zero_point;
  bool symmetric;
  const bool* left_out;
  WideColumns wide;
};

// A product of rows that are quantized here; all arguments are checked.
Tensor int8_product(const char* op, const Tensor& x, const Tensor& packed,
                    const Tensor& weight_scale, int64_t out_features, const Int8Input& input,
                    const OptionalTensor& bias, const ExpertRows& rows) {
  const Tensor out = new_tensor(x, {x.size(0), out_features}, x.scalar_type());
  if (out.numel() == 0) return out;
  GemmArgs args = gemm_args(op, x, out, packed, (x.size(1) + 3) / 4, bias, rows);
  check_same_device(op, "weight_scale", weight_scale, x);
  if (input.scale) check_same_device(op, "input_scale", *input.scale, x);
  if (input.zero_point) check_same_device(op, "input_zero_point", *input.zero_point, x);
  const int64_t row_bytes = row_bytes_of(x.size(1));
  const Tensor codes = new_tensor(x, {x.size(0), row_bytes}, ScalarType::Char);
  const Tensor scale = new_tensor(x, {x.size(0)}, ScalarType::Float);
  const bool offset = !input.symmetric || input.zero_point;
  const Tensor zero = new_tensor(x, {offset ? x.size(0) : 0}, ScalarType::Int);
  Int8Rows how = {};
  how.x = float_matrix(op, x);
  how.experts = args.experts;
  how.symmetric = input.symmetric;
  how.scale = pointer<float>(input.scale);
  how.zero_point = pointer<int8_t>(input.zero_point);
  how.left_out = input.left_out;
  how.codes = data<int8_t>(codes);
  how.row_bytes = row_bytes;
  how.row_scale = data<float>(scale);
  how.row_zero = offset ? data<int32_t>(zero) : nullptr;
  check_launch(op, int8_rows(how, current_stream(x)));
  args.a.data = codes.const_data_ptr();
  args.a.row_bytes = row_bytes;
  const bool one_scale = weight_scale.size(weight_scale.dim() - 1) == 1;
  args.scales = {how.row_scale, how.row_zero, pointer<float>(weight_scale), one_scale};
  args.wide = input.wide;
  run_gemm(op, WeightKind::kInt8, DType::kInt8, args, x);
  return out;
}

Tensor int8_gemm(const Tensor& a, const Tensor& packed, int64_t out_features) {
  constexpr auto kOp = "int8_gemm";
  check_int8_gemm(kOp, a, packed, out_features);
  const auto guard = use_device_of(a);
  const Tensor out = new_tensor(a, {a.size(0), out_features}, ScalarType::Int);
  if (out.numel() == 0) return out;
  const ExpertRows all;
  GemmArgs args = gemm_args(kOp, a, out, packed, (a.size(1) + 3) / 4, std::nullopt, all);
  const StagedInput staged = stage_input(kOp, a, WeightKind::kInt8, std::nullopt, all, args);
  run_gemm(kOp, WeightKind::kInt8, DType::kInt8, args, a);
  return out;
}

Tensor w8a8_gemm(const Tensor& x, const Tensor& packed, const Tensor& weight_scale,
                 int64_t out_features, const OptionalTensor& input_scale,
                 const OptionalTensor& input_zero_point, bool symmetric,
                 const OptionalTensor& bias) {
  constexpr auto kOp = "w8a8_gemm";
  check_w8a8_gemm(kOp, x, packed, weight_scale, out_features, input_scale, input_zero_point,
                  symmetric, bias);
  const auto guard = use_device_of(x);
  return int8_product(kOp, x, packed, weight_scale, out_features,
                      {input_scale, input_zero_point, symmetric, nullptr, {}}, bias, {});
}

Tensor moe_w8a8_gemm(const Tensor& x, const Tensor& offsets, const Tensor& packed,
                     const Tensor& weight_scale, int64_t out_features,
                     const OptionalTensor& input_scale, const OptionalTensor& input_zero_point,
                     bool symmetric, const OptionalTensor& bias, const OptionalTensor& row_scale) {
  constexpr auto kOp = "moe_w8a8_gemm";
  const ExpertRows rows{offsets, row_scale};
  check_experts(kOp, x, rows, out_features);
  check_stack(kOp, "packed", packed, rows);
  check_stack(kOp, "weight_scale", weight_scale, rows);
  check_stack(kOp, "input_scale", input_scale, rows);
  check_stack(kOp, "input_zero_point", input_zero_point, rows);
  check_stack(kOp, "bias", bias, rows);
  if (rows.count() > 0) {
    check_w8a8_gemm("w8a8_gemm", x, first_part(packed), first_part(weight_scale), out_features,
                    first_number(input_scale), first_number(input_zero_point), symmetric,
                    first_part(bias));
  }
  const auto guard = use_device_of(x);
  return int8_product(kOp, x, packed, weight_scale, out_features,
                      {input_scale, input_zero_point, symmetric, nullptr, {}}, bias, rows);
}

Tensor int8_mixed_gemm(const Tensor& x, const Tensor& packed, const Tensor& weight_scale,
                       int64_t out_features, double threshold, const OptionalTensor& bias) {
  constexpr auto kOp = "int8_mixed_gemm";
  check_int8_mixed_gemm(kOp, x, packed, weight_scale, out_features, threshold, bias);
  const auto guard = use_device_of(x);
  const int64_t cols = x.size(1);
  const bool any = x.numel() > 0;
  const Tensor left_out = new_tensor(x, {cols}, ScalarType::Bool);
  const Tensor list = new_tensor(x, {cols + 1}, ScalarType::Int);
  WideColumns wide = {};
  if (any) {
    wide = {data<int32_t>(list) + cols, data<int32_t>(list), float_matrix(kOp, x)};
    check_launch(
        kOp, find_wide_columns(wide.x, static_cast<float>(threshold), data<bool>(left_out),
                               data<int32_t>(list) + cols, data<int32_t>(list), current_stream(x)));
  }
  const OptionalTensor none;
  return int8_product(kOp, x, packed, weight_scale, out_features,
                      {none, none, true, any ? data<bool>(left_out) : nullptr, wide}, bias, {});
}

}  // namespace
}  // namespace ops
}  // namespace qk::cuda

QUANTKIT_CUDA_OPS(m) {
  m.impl("int8_gemm", TORCH_BOX(&qk::cuda::ops::int8_gemm));
  m.impl("w8a8_gemm", TORCH_BOX(&qk::cuda::ops::w8a8_gemm));
  m.impl("int8_mixed_gemm", TORCH_BOX(&qk::cuda::ops::int8_mixed_gemm));
  m.impl("moe_w8a8_gemm", TORCH_BOX(&qk::cuda::ops::moe_w8a8_gemm));
}
