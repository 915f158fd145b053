// histogram_scale on the CPU.
#include "cpu/histogram_scale.h"

#include <algorithm>
#include <cmath>

#include "cpu/histogram.h"
#include "ops/cpu_ops.h"

namespace qk::cpu {

std::tuple<Tensor, Tensor> histogram_scale(const Tensor& counts, const Tensor& span,
                                           const Tensor& range, int64_t method, double parameter,
                                           int64_t q_min, int64_t q_max, bool symmetric,
                                           double divisor) {
  constexpr auto kOp = "histogram_scale";
  check(counts.dim() == 1 && counts.size(0) == kHistogramBins &&
            counts.scalar_type() == ScalarType::Long,
        kOp, "counts must be torch.int64 [", kHistogramBins, "], got ",
        name_of(counts.scalar_type()), " ", text_of(counts.sizes()));
  check(span.dim() == 1 && span.size(0) == 1 && span.scalar_type() == ScalarType::Float, kOp,
        "span must be torch.float32 [1], got ", name_of(span.scalar_type()), " ",
        text_of(span.sizes()));
  check(range.dim() == 1 && range.size(0) == 2 && range.scalar_type() == ScalarType::Float, kOp,
        "range must be torch.float32 [2], got ", name_of(range.scalar_type()), " ",
        text_of(range.sizes()));
  check(counts.is_contiguous() && range.is_contiguous(), kOp,
        "counts and range must be contiguous");
  check_same_device(kOp, "span", span, counts);
  check_same_device(kOp, "range", range, counts);
  check(0 <= method && method <= 4, kOp, "method must be 0 to 4, got ", method);
  check_code_range(kOp, q_min, q_max);
  check(!symmetric || (q_min < 0 && 0 < q_max && divisor > 0.0), kOp,
        "a symmetric scale needs q_min < 0 < q_max and a positive divisor");
  const auto how = static_cast<ScaleMethod>(method);
  check(how != ScaleMethod::kPercentile || (parameter > 0.0 && parameter <= 100.0), kOp,
        "percentile must be in (0, 100], got ", parameter);
  check(how != ScaleMethod::kMse || (parameter > 0.0 && parameter <= 8.0), kOp,
        "the norm of mse must be above 0 and at most 8, got ", parameter);
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
