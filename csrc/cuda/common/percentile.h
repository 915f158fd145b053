// Scales of ranges that hold a given part of a block's values: exact order statistics.
#pragma once

#include "cuda/common/types.h"

namespace qk::cuda {

struct PercentileScale {
  double part;  // of the values, in (0, 1]
  int q_min, q_max;
  bool symmetric;
  float divisor;
  DType scale_dtype;
};

// Blocks of more elements are counted in pieces, by all of the device.
constexpr int64_t kLargestRanked = 131072;

// Bytes of workspace that percentile_scales needs, a multiple of 8.
int64_t percentile_workspace(const Blocks& blocks, const PercentileScale& how);

// One scale and zero point, null if symmetric, for each block; of a block with NaN or infinities
// the scale is NaN and the zero point 0.
cudaError_t percentile_scales(const Matrix& x, const Blocks& blocks, const PercentileScale& how,
                              void* workspace, float* scale, int8_t* zero_point,
                              cudaStream_t stream);

}  // namespace qk::cuda
