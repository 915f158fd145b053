// The losses of many quantizations of a weight under a Gram matrix g: tr(E g E^T) of the errors
// E = Q(w * s) / s - w, for pairs of a smoothing vector s and a clip ratio.
#pragma once

#include "cuda/common/types.h"

namespace qk::cuda {

struct AwqQuantizer {
  int group;  // columns
  int q_min, q_max;
  bool symmetric;
  float divisor;
  DType scale_dtype;
};

// A candidate is number `first` + i of pairs of a vector and a ratio, the ratio running faster.
struct AwqCandidates {
  int first, count;
  const float* scales;  // [vectors, cols], rows `stride` apart
  int64_t stride;
  const float* clip;  // [clips]
  int clips;
};

// Errors fp32 [count, rows, stride], zeros beyond the columns; the stride is a multiple of 4.
cudaError_t awq_errors(const Matrix& w, const AwqQuantizer& how, const AwqCandidates& candidates,
                       float* errors, int64_t stride, cudaStream_t stream);

// Doubles that awq_losses needs for `count` candidates.
int64_t awq_workspace(int count, int rows, int cols);

// losses [count], infinite where not finite; in an order that the shape alone decides. g's rows are
// contiguous.
cudaError_t awq_losses(const float* errors, int64_t stride, int count, int rows, int cols,
                       const float* g, int64_t g_stride, double* workspace, float* losses,
                       cudaStream_t stream);

}  // namespace qk::cuda
