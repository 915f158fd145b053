// Distance of a quantized matrix from its source.
#pragma once

#include "cuda/common/types.h"

namespace qk::cuda {

// Doubles of workspace that quantization_error needs.
int error_workspace(int rows, int cols);

// out fp64 [4]: sum of (x - x^)^2, sum of x^2, max |x - x^|, max |x|; summed in an order that the
// shape alone decides.
cudaError_t quantization_error(const Matrix& x, const Matrix& q, const Blocks& blocks,
                               const float* scale, const int8_t* zero_point, double* workspace,
                               double* out, cudaStream_t stream);

}  // namespace qk::cuda
