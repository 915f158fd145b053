// quantization_error on the CPU.
#include "cpu/error.h"

#include <cmath>

#include "ops/scales.h"

namespace qk::cpu {

Tensor quantization_error(const Tensor& x, const Tensor& q, const Tensor& scale,
                          const std::optional<Tensor>& zero_point, const Block& block) {
  constexpr auto kOp = "quantization_error";
  const Grid grid = check_scale(kOp, x, scale, zero_point, block);
  check_float(kOp, "x", x);
  check_rows(kOp, "x", x);
  check(q.dim() == 2 && q.size(0) == x.size(0) && q.size(1) == x.size(1), kOp, "q ",
        text_of(q.sizes()), " must have x's shape ", text_of(x.sizes()));
  check_quantized(kOp, "q", q);
  check_rows(kOp, "q", q);
  check_same_device(kOp, "q", q, x);
  const int64_t rows = x.size(0);
  Tensor result = empty(x, {4}, ScalarType::Double);
  double* out = data<double>(result);
  for (int i = 0; i < 4; ++i) out[i] = 0.0;
  if (x.numel() == 0) return result;

  // One partial result a row, whoever computes it, and one order to add them up: threads leave no
  // trace.
  std::vector<double> partial(4 * rows);
  const Scales scales = scales_of(grid, scale, zero_point);
  const DType dtype = dtype_of(kOp, x.scalar_type()), format = dtype_of(kOp, q.scalar_type());
  parallel_rows(rows, x.size(1), [&](int64_t begin, int64_t end) {
    error_kernels().quantization_error(dtype, rows_of(x, begin, end), format,
                                       rows_of(q, begin, end), scales, partial.data());
  });
  for (int64_t r = 0; r < rows; ++r) {
    const double* row = partial.data() + 4 * r;
    for (int i = 0; i < 2; ++i) out[i] += row[i];
    for (int i = 2; i < 4; ++i) out[i] = out[i] > row[i] || std::isnan(out[i]) ? out[i] : row[i];
  }
  return result;
}

}  // namespace qk::cpu

STABLE_TORCH_LIBRARY_IMPL(quantkit, CPU, m) {
  m.impl("quantization_error", TORCH_BOX(&qk::cpu::quantization_error));
}
