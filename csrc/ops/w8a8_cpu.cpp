// pack_w8a8, int8_gemm and w8a8_gemm on the CPU.
#include "ops/w8a8.h"

#include "ops/pack_check.h"

namespace qk::cpu {

using Optional = std::optional<Tensor>;

Tensor pack_w8a8(const Tensor& codes) {
  constexpr auto kOp = "pack_w8a8";
  check_pack_w8a8(kOp, codes);
  const int64_t rows = codes.size(0), cols = codes.size(1);
  const int64_t panels = (rows + kPanel - 1) / kPanel;
  Tensor packed = output(codes, {panels, w8a8_panel_bytes(cols)}, ScalarType::Char);
  if (panels == 0) return packed;
  const auto* const from = static_cast<const int8_t*>(codes.const_data_ptr());
  const int64_t stride = rows > 1 ? codes.stride(0) : cols;
  parallel_rows(panels, kPanel * cols, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      w8a8_pack(from, stride, rows, cols, panel, data<int8_t>(packed));
    }
  });
  return packed;
}

Tensor int8_gemm(const Tensor& a, const Tensor& packed, int64_t out_features) {
  constexpr auto kOp = "int8_gemm";
  check_int8_gemm(kOp, a, packed, out_features);
  Tensor out = output(a, {a.size(0), out_features}, ScalarType::Int);
  if (out.numel() == 0) return out;
  Int8Product product = {};
  product.input = {
      DType::kInt8, a.const_data_ptr(), a.stride(0), a.size(1), true, nullptr, nullptr, nullptr, 0};
  product.rows = a.size(0);
  product.out_features = out_features;
  product.packed = static_cast<const int8_t*>(packed.const_data_ptr());
  product.task.dtype = DType::kInt8;
  product.task.out = data<void>(out);
  product.task.stride = out_features;
  int8_product(a, product);
  return out;
}

Tensor w8a8_gemm(const Tensor& x, const Tensor& packed, const Tensor& weight_scale,
                 int64_t out_features, const Optional& input_scale,
                 const Optional& input_zero_point, bool symmetric, const Optional& bias) {
  constexpr auto kOp = "w8a8_gemm";
  check_w8a8_gemm(kOp, x, packed, weight_scale, out_features, input_scale, input_zero_point,
                  symmetric, bias);
  Tensor out = output(x, {x.size(0), out_features}, x.scalar_type());
  if (out.numel() == 0) return out;
  const DType dtype = dtype_of(kOp, x.scalar_type());
  Int8Product product = scaled_product(dtype, x, packed, weight_scale, bias, out);
  product.input.symmetric = symmetric;
  if (input_scale) product.input.scale = static_cast<const float*>(input_scale->const_data_ptr());
  if (input_zero_point) {
    product.input.zero_point = static_cast<const int8_t*>(input_zero_point->const_data_ptr());
  }
  int8_product(x, product);
  return out;
}

}  // namespace qk::cpu

STABLE_TORCH_LIBRARY_IMPL(quantkit, CPU, m) {
  m.impl("pack_w8a8", TORCH_BOX(&qk::cpu::pack_w8a8));
  m.impl("int8_gemm", TORCH_BOX(&qk::cpu::int8_gemm));
  m.impl("w8a8_gemm", TORCH_BOX(&qk::cpu::w8a8_gemm));
}
