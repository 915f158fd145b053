// The scale of a block by trying several: which of some shrunken ranges quantizes it with the least
// error.
#pragma once

#include "cuda/common/types.h"

namespace qk::cuda {

constexpr int kBadValue = 1, kBadImportance = 2;  // bits of the status word

struct ScaleSearch {
  int q_min, q_max;
  bool symmetric;
  float divisor;
  DType scale_dtype;
  float norm;
  double range;  // candidate i has 1 - range * i / steps of the block's range
  int steps;
  bool signs;               // after all of these scales, the same ones negated
  const float* importance;  // [cols], or null
};

cudaError_t check_importance(const float* importance, int n, int* status, cudaStream_t stream);

// Blocks of more elements are searched in pieces, by all of the device.
constexpr int64_t kLargestSearch = 131072;

// One scale and zero point, null if symmetric, for each block.
cudaError_t search_scales(const Matrix& x, const Blocks& blocks, const ScaleSearch& how,
                          float* scale, int8_t* zero_point, int* status, cudaStream_t stream);

// Of each block; the largest magnitude is `high` alone if symmetric.
struct SearchRanges {
  const float *low, *high;
};

// Doubles that search_large_scales needs.
int64_t search_workspace(const Matrix& x, const Blocks& blocks, const ScaleSearch& how);

cudaError_t search_large_scales(const Matrix& x, const Blocks& blocks, const ScaleSearch& how,
                                const SearchRanges& ranges, double* workspace, float* scale,
                                int8_t* zero_point, int* status, cudaStream_t stream);

}  // namespace qk::cuda
