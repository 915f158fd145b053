// histogram_scale on the CPU.
#include "cpu/histogram_scale.h"

#include <algorithm>
#include <cmath>

#include "cpu/histogram.h"
#include "ops/cpu_ops.h"
#include "ops/histogram_check.h"

namespace qk::cpu {

std::tuple<Tensor, Tensor> histogram_scale(const Tensor& counts, const Tensor& span,
                                           const Tensor& range, int64_t method, double parameter,
                                           int64_t q_min, int64_t q_max, bool symmetric,
                                           double divisor) {
  constexpr auto kOp = "histogram_scale";
  const ScaleMethod how = check_histogram_scale(kOp, counts, span, range, method, parameter, q_min,
                                                q_max, symmetric, divisor);
  const float* const ends = static_cast<const float*>(range.const_data_ptr());
  check(std::isfinite(ends[0]) && std::isfinite(ends[1]), kOp, "range must be finite");
  const int64_t* const bins = static_cast<const int64_t*>(counts.const_data_ptr());
  check(std::all_of(bins, bins + kHistogramBins, [](int64_t count) { return count >= 0; }), kOp,
        "counts must not be negative");
  const HistogramValues values{bins, *static_cast<const float*>(span.const_data_ptr()),
                               std::min(ends[0], 0.0f), std::max(ends[1], 0.0f)};
  const CodeRange codes{static_cast<int>(q_min), static_cast<int>(q_max), symmetric, divisor};
  const ScaleAndZero found = qk::histogram_scale(values, how, parameter, codes);
  Tensor scale = empty(range, {1, 1}, ScalarType::Float);
  *data<float>(scale) = static_cast<float>(found.scale);
  if (symmetric) return {scale, empty(range, {0}, ScalarType::Char)};
  Tensor zero_point = empty(range, {1, 1}, ScalarType::Char);
  *data<int8_t>(zero_point) = static_cast<int8_t>(found.zero_point);
  return {scale, zero_point};
}

}  // namespace qk::cpu

STABLE_TORCH_LIBRARY_IMPL(quantkit, CPU, m) {
  m.impl("histogram_scale", TORCH_BOX(&qk::cpu::histogram_scale));
}
