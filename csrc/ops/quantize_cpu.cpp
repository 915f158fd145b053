// quantize_int, quantize_fp8 and dequantize on the CPU.
#include "cpu/quantize.h"

#include "ops/scales.h"

namespace qk::cpu {

Tensor quantize_int(const Tensor& x, const Tensor& scale, const std::optional<Tensor>& zero_point,
                    const Block& block, int64_t q_min, int64_t q_max) {
  constexpr auto kOp = "quantize_int";
  const Grid grid = check_scale(kOp, x, scale, zero_point, block);
  check_float(kOp, "x", x);
  check_rows(kOp, "x", x);
  check_code_range(kOp, q_min, q_max);
  Tensor q = output(x, {x.size(0), x.size(1)}, ScalarType::Char);
  if (x.numel() == 0) return q;
  const Scales scales = scales_of(grid, scale, zero_point);
  const DType dtype = dtype_of(kOp, x.scalar_type());
  parallel_rows(x.size(0), x.size(1), [&](int64_t begin, int64_t end) {
    quantize_kernels().quantize_int(dtype, rows_of(x, begin, end), scales, static_cast<int>(q_min),
                                    static_cast<int>(q_max), data<int8_t>(q));
  });
  return q;
}

Tensor quantize_fp8(const Tensor& x, const Tensor& scale, const Block& block, ScalarType dtype) {
  constexpr auto kOp = "quantize_fp8";
  const Grid grid = check_scale(kOp, x, scale, std::nullopt, block);
  check_float(kOp, "x", x);
  check_rows(kOp, "x", x);
  check_fp8_dtype(kOp, dtype);
  Tensor q = output(x, {x.size(0), x.size(1)}, dtype);
  if (x.numel() == 0) return q;
  const Scales scales = scales_of(grid, scale, std::nullopt);
  const DType from = dtype_of(kOp, x.scalar_type()), to = dtype_of(kOp, dtype);
  parallel_rows(x.size(0), x.size(1), [&](int64_t begin, int64_t end) {
    quantize_kernels().quantize_fp8(from, rows_of(x, begin, end), scales, to, data<uint8_t>(q));
  });
  return q;
}

Tensor dequantize(const Tensor& q, const Tensor& scale, const std::optional<Tensor>& zero_point,
                  const Block& block, ScalarType dtype) {
  constexpr auto kOp = "dequantize";
  const Grid grid = check_scale(kOp, q, scale, zero_point, block);
  check_quantized(kOp, "q", q);
  check_rows(kOp, "q", q);
  check(is_float(dtype), kOp, "dtype must be float32, float16 or bfloat16, got ", name_of(dtype));
  Tensor out = output(q, {q.size(0), q.size(1)}, dtype);
  if (q.numel() == 0) return out;
  const Scales scales = scales_of(grid, scale, zero_point);
  const DType from = dtype_of(kOp, q.scalar_type()), to = dtype_of(kOp, dtype);
  parallel_rows(q.size(0), q.size(1), [&](int64_t begin, int64_t end) {
    quantize_kernels().dequantize(from, rows_of(q, begin, end), scales, to, data<void>(out));
  });
  return out;
}

}  // namespace qk::cpu

STABLE_TORCH_LIBRARY_IMPL(quantkit, CPU, m) {
  m.impl("quantize_int", TORCH_BOX(&qk::cpu::quantize_int));
  m.impl("quantize_fp8", TORCH_BOX(&qk::cpu::quantize_fp8));
  m.impl("dequantize", TORCH_BOX(&qk::cpu::dequantize));
}
