// What the ops that search for scales share.
#pragma once

#include <cmath>

#include "ops/cpu_ops.h"
#include "ops/search_check.h"

namespace qk::cpu {

// An extreme of every block.
inline void check_finite(const char* op, const Tensor& extreme) {
  const float* values = static_cast<const float*>(extreme.const_data_ptr());
  for (int64_t i = 0; i < extreme.numel(); ++i) {
    check(std::isfinite(values[i]), op, "x must be finite");
  }
}

}  // namespace qk::cpu
