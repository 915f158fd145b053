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
  bool signs;               // also tries each scale negated, after all others; symmetric codes only
  const float* importance;  // [cols], or null
};

cudaError_t search_scales(const Matrix& x, const Blocks& blocks, const ScaleSearch& how,
                          float* scale, int8_t* zero_point, int* status, cudaStream_t stream);

}  // namespace qk::cuda
