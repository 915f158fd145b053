// Counts of values in bins whose width doubles when a value does not fit.
#pragma once

#include "cuda/common/gram.h"  // TokenMask

namespace qk::cuda {

constexpr int kHistogramBins = 8192;  // over [-span, span]

// Floats of workspace that histogram needs.
int histogram_workspace(int rows, int cols);

// Counts x's values into counts int64 [8192]; span fp32 [1] grows first if it has to. Neither is
// touched, and `status` set to 1, if a value is NaN, infinite or 2^127 and more. `status` starts as
// 0.
cudaError_t histogram(const Matrix& x, const TokenMask& mask, int64_t* counts, float* span,
                      float* workspace, int* status, cudaStream_t stream);

}  // namespace qk::cuda
