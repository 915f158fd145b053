// The scale of all values that a histogram (histogram.h) counted. Plain C++ for every CPU: some
// million operations in fp64, once for each input of a layer.
#pragma once

#include <cstdint>

namespace qk {

enum class ScaleMethod { kPercentile, kMse, kKl, kEq, kAdmm };

struct HistogramValues {
  const int64_t* counts;  // [kHistogramBins]
  double span;
  double low, high;  // the extremes, low <= 0 <= high
};

struct CodeRange {
  int q_min, q_max;
  bool symmetric;
  double divisor;
};

struct ScaleAndZero {
  double scale;  // an fp32 number
  double zero_point;
};

// `parameter` is the percentage of values to be kept (percentile), or the norm of errors (mse).
ScaleAndZero histogram_scale(const HistogramValues& values, ScaleMethod method, double parameter,
                             const CodeRange& codes);

}  // namespace qk
