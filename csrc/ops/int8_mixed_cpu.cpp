// int8_mixed_gemm on the CPU: columns with outliers are found first, then left out of the int8
// product and added in fp32.
#include <algorithm>
#include <cmath>

#include "cpu/reduce.h"
#include "ops/w8a8.h"

namespace qk::cpu {
namespace {

float to_float(Half h) {
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000) << 16;
  const int exponent = h.bits >> 10 & 31, mantissa = h.bits & 1023;
  const float size = exponent == 31 ? (mantissa ? NAN : INFINITY)
                     : exponent == 0
                         ? std::ldexp(static_cast<float>(mantissa), -24)
                         : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  return sign ? -size : size;
}
float to_float(BFloat16 x) {
  const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
  float result;
  std::memcpy(&result, &wide, sizeof(result));
  return result;
}
float to_float(float x) { return x; }

// f(T{}) for x's element type.
template <typename Body>
void visit(DType dtype, const Body& body) {
  if (dtype == DType::kFloat32) return body(float{});
  if (dtype == DType::kFloat16) return body(Half{});
  body(BFloat16{});
}

// The columns that hold a magnitude of `threshold` or more; NaN is none.
std::vector<int32_t> find_outliers(DType dtype, const Tensor& x, float threshold) {
  const int64_t rows = x.size(0), cols = x.size(1), stride = x.stride(0);
  constexpr int64_t kStep = 512;  // columns at a time
  std::vector<float> most(cols);
  parallel_rows((cols + kStep - 1) / kStep, rows * kStep, [&](int64_t begin, int64_t end) {
    std::vector<char> scratch(reduce_scratch_bytes(kStep));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * kStep;
      reduce_kernels().absmax(dtype, element(x, first), stride, rows, std::min(kStep, cols - first),
                              1, scratch.data(), most.data() + first);
    }
  });
  std::vector<int32_t> columns;
  visit(dtype, [&]<class T>(T) {
    const T* const values = static_cast<const T*>(x.const_data_ptr());
    for (int64_t k = 0; k < cols; ++k) {
      bool outlier = most[k] >= threshold;
      if (std::isnan(most[k])) {  // which hides the others of its column
        for (int64_t r = 0; r < rows && !outlier; ++r) {
          outlier = std::fabs(to_float(values[r * stride + k])) >= threshold;
        }
      }
      if (outlier) columns.push_back(static_cast<int32_t>(k));
    }
  });
  return columns;
}

}  // namespace

Tensor int8_mixed_gemm(const Tensor& x, const Tensor& packed, const Tensor& weight_scale,
                       int64_t out_features, double threshold, const std::optional<Tensor>& bias) {
  constexpr auto kOp = "int8_mixed_gemm";
  check_int8_mixed_gemm(kOp, x, packed, weight_scale, out_features, threshold, bias);
  Tensor out = output(x, {x.size(0), out_features}, x.scalar_type());
  if (out.numel() == 0) return out;
  const DType dtype = dtype_of(kOp, x.scalar_type());
  Int8Product product = scaled_product(dtype, x, packed, weight_scale, bias, out);
  std::vector<int32_t> columns;
  if (x.size(1) > 0) columns = find_outliers(dtype, x, static_cast<float>(threshold));
  const int64_t count = static_cast<int64_t>(columns.size());
  std::vector<float> values(x.size(0) * count);
  visit(dtype, [&]<class T>(T) {
    const T* row = static_cast<const T*>(x.const_data_ptr());
    for (int64_t r = 0; r < x.size(0); ++r, row += x.stride(0)) {
      for (int64_t i = 0; i < count; ++i) values[r * count + i] = to_float(row[columns[i]]);
    }
  });
  product.wide = {columns.data(), values.data(), count};
  int8_product(x, product);
  return out;
}

}  // namespace qk::cpu

STABLE_TORCH_LIBRARY_IMPL(quantkit, CPU, m) {
  m.impl("int8_mixed_gemm", TORCH_BOX(&qk::cpu::int8_mixed_gemm));
}
