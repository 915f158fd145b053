// The scale of all values that a histogram counted.
#pragma once

#include <cuda_runtime_api.h>

#include "cpu/histogram_scale.h"  // ScaleMethod, CodeRange

namespace qk::cuda {

// Doubles of workspace that histogram_scale needs.
constexpr int kHistogramLosses = 2049;

// counts int64 [kHistogramBins], span [1] and range [2] as ops/histogram_scale.py has them; scale
// [1], zero_point [1] or null if symmetric. NaN, and 0, where the range is not finite or a count
// negative.
cudaError_t histogram_scale(const int64_t* counts, const float* span, const float* range,
                            ScaleMethod method, double parameter, const CodeRange& codes,
                            double* workspace, float* scale, int8_t* zero_point,
                            cudaStream_t stream);

}  // namespace qk::cuda
