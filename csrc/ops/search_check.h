// What the ops that search for scales check, whichever kernel serves the call.
#pragma once

#include <cmath>

#include "ops/check.h"

namespace qk {

inline void check_search_codes(const char* op, int64_t q_min, int64_t q_max, bool symmetric,
                               double divisor) {
  check_code_range(op, q_min, q_max);
  check(!symmetric || (q_min <= 0 && 0 <= q_max), op, "[q_min, q_max] must hold 0, got [", q_min,
        ", ", q_max, "]");
  check(!symmetric || (divisor > 0.0 && std::isfinite(divisor)), op,
        "divisor must be positive, got ", divisor);
}

inline void check_percentile(const char* op, double percentile) {
  check(percentile > 0.0 && percentile <= 100.0, op, "percentile must be in (0, 100], got ",
        percentile);
}

}  // namespace qk
