// What the histogram ops check, whichever kernel serves the call; the words are those of
// python/quantkit/ops.
#pragma once

#include "cpu/histogram_scale.h"
#include "ops/check.h"

namespace qk {

inline void check_histogram(const char* op, const Tensor& counts, const Tensor& span) {
  constexpr int64_t kBins = 8192;
  check(counts.dim() == 1 && counts.size(0) == kBins && counts.scalar_type() == ScalarType::Long,
        op, "counts must be torch.int64 [", kBins, "], got ", name_of(counts.scalar_type()), " ",
        text_of(counts.sizes()));
  check(span.dim() == 1 && span.size(0) == 1 && span.scalar_type() == ScalarType::Float, op,
        "span must be torch.float32 [1], got ", name_of(span.scalar_type()), " ",
        text_of(span.sizes()));
  check(counts.is_contiguous(), op, "counts must be contiguous, got strides ",
        text_of(counts.strides()));
}

// All but the numbers in them.
inline void check_accumulate(const char* op, const Tensor& x, const OptionalTensor& mask,
                             const Tensor& counts, const Tensor& span) {
  check_histogram(op, counts, span);
  check_same_device(op, "counts", counts, x);
  check_same_device(op, "span", span, x);
  if (mask) {
    check(mask->dim() == 1 && mask->size(0) == x.size(0) && mask->scalar_type() == ScalarType::Bool,
          op, "mask must be torch.bool [", x.size(0), "], one value a row of x");
    check_same_device(op, "mask", *mask, x);
  }
}

// The same; gives back the method.
inline ScaleMethod check_histogram_scale(const char* op, const Tensor& counts, const Tensor& span,
                                         const Tensor& range, int64_t method, double parameter,
                                         int64_t q_min, int64_t q_max, bool symmetric,
                                         double divisor) {
  check_histogram(op, counts, span);
  check(range.dim() == 1 && range.size(0) == 2 && range.scalar_type() == ScalarType::Float, op,
        "range must be torch.float32 [2], got ", name_of(range.scalar_type()), " ",
        text_of(range.sizes()));
  check(range.is_contiguous(), op, "range must be contiguous, got strides ",
        text_of(range.strides()));
  check_same_device(op, "span", span, counts);
  check_same_device(op, "range", range, counts);
  check(0 <= method && method <= 4, op, "method must be 0 to 4, got ", method);
  check_code_range(op, q_min, q_max);
  check(!symmetric || (q_min < 0 && 0 < q_max && divisor > 0.0), op,
        "a symmetric scale needs q_min < 0 < q_max and a positive divisor");
  const auto how = static_cast<ScaleMethod>(method);
  check(how != ScaleMethod::kPercentile || (parameter > 0.0 && parameter <= 100.0), op,
        "percentile must be in (0, 100], got ", parameter);
  check(how != ScaleMethod::kMse || (parameter > 0.0 && parameter <= 8.0), op,
        "the norm of mse must be above 0 and at most 8, got ", parameter);
  return how;
}

}  // namespace qk
