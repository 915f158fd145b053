// The GPTQ sweep in steps that the torch boundary puts together: rows run in parallel, columns one
// after the other in stripes, and a stripe takes the errors of all columns before it in one matrix
// product (left-looking).
#pragma once

#include "cuda/common/types.h"

namespace qk::cuda {

constexpr int kSweepCols = 128;  // of a stripe

// Bits of the status word.
constexpr int kSweepBadWeight = 1, kSweepBadLoss = 2, kSweepBadDiagonal = 4, kSweepBadGroup = 8;

// Everything is contiguous but for w and the factor: their rows are, and lie a stride apart.
struct Sweep {
  int batch, rows, cols, groups, factors;
  const float* w;  // [batch, rows, cols]
  int64_t w_stride, w_batch;
  const float* factor;
  int64_t factor_stride, factor_batch;
  float* diagonal;  // the factor's, [factors, cols]
  float*
      values;  // [batch * rows, stride]: the weight, then, once it is rounded, by how much it fell
  int64_t stride;  // a multiple of 4
  // The factor over its diagonal, [factors, cols, share_stride], in the columns from `origin` on.
  float* share;
  int64_t share_stride;
  int origin;
  const int* g_idx;  // [cols] or null: column / size
  int size;
  float* scale;        // [batch * rows, groups]
  int8_t* zero_point;  // likewise, or null
  int8_t* codes;       // [batch * rows, cols]
  float* loss;         // [batch * rows]
  int* status;
  // How scales are found.
  bool symmetric, signs;
  float divisor;
  DType scale_dtype;
  int q_min, q_max;
  // 0: integer codes. 8, 4: values of e4m3 and e2m1, both as e4m3 codes; scales are given then.
  int float_bits;
  double search_range;
  int search_steps;

  __host__ __device__ int64_t factor_of(int64_t matrix) const { return factors == 1 ? 0 : matrix; }
};

// values, diagonal, and the checks of both and g_idx.
cudaError_t sweep_prepare(const Sweep& sweep, cudaStream_t stream);

// share, in the columns [origin, origin + width) and the rows above their end.
cudaError_t sweep_share(const Sweep& sweep, int width, cudaStream_t stream);

// The columns [first, first + width) make up for the columns [begin, end) before them.
cudaError_t sweep_update(const Sweep& sweep, int first, int width, int begin, int end,
                         cudaStream_t stream);

// Floats that sweep_fit needs for groups of `width` columns.
int64_t sweep_fit_workspace(const Sweep& sweep, int width);

// The scale of the group that is [first, first + width). `in_turn`: candidates are scored by a
// sweep of the group, whose share there is; else by columns rounded alone, of the weights as they
// are.
cudaError_t sweep_fit(const Sweep& sweep, int group, int first, int width, bool in_turn,
                      float* workspace, cudaStream_t stream);

// Rounds [first, first + width), at most kSweepCols.
cudaError_t sweep_stripe(const Sweep& sweep, int first, int width, cudaStream_t stream);

}  // namespace qk::cuda
