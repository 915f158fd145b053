// Scales and zero points from reductions; n contiguous elements each.
#pragma once

#include "cuda/common/types.h"

namespace qk::cuda {

cudaError_t make_symmetric_scale(const float* amax, int64_t n, float divisor, DType scale_dtype,
                                 float* scale, cudaStream_t stream);
cudaError_t make_asymmetric_scale(const float* low, const float* high, int64_t n, int q_min,
                                  int q_max, DType scale_dtype, float* scale, int8_t* zero_point,
                                  cudaStream_t stream);

}  // namespace qk::cuda
