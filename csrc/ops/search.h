// What the ops that search for scales share.
#pragma once

#include <cmath>

#include "ops/cpu_ops.h"

namespace qk::cpu {

inline void check_search_codes(const char* op, int64_t q_min, int64_t q_max, bool symmetric,
                               double divisor) {
  check_code_range(op, q_min, q_max);
  check(!symmetric || (q_min <= 0 && 0 <= q_max), op, "[q_min, q_max] must hold 0, got [", q_min,
        ", ", q_max, "]");
  check(!symmetric || (divisor > 0.0 && std::isfinite(divisor)), op,
        "divisor must be positive, got ", divisor);
}

// An extreme of every block.
inline void check_finite(const char* op, const Tensor& extreme) {
  const float* values = static_cast<const float*>(extreme.const_data_ptr());
  for (int64_t i = 0; i < extreme.numel(); ++i) {
    check(std::isfinite(values[i]), op, "x must be finite");
  }
}

}  // namespace qk::cpu
