// The GPTQ sweep in steps that the torch boundary puts together: rows run in parallel, columns one
// after the other in stripes, and a stripe takes the errors of all columns before it in one matrix
// product (left-looking).
#pragma once

#include "cuda/common/types.h"

namespace qk::cuda {

constexpr int kSweepCols = 128;  // of a stripe
constexpr int kSweepFit = 16;    // groups of a multiple of so many columns are fitted in the stripe

// Bits of the status word.
constexpr int kSweepBadWeight = 1, kSweepBadLoss = 2, kSweepBadDiagonal = 4, kSweepBadGroup = 8;

// Everything is contiguous but for u: its rows are, and lie u_stride apart.
struct Sweep {
  int batch, rows, cols, groups;
  float* values;   // [batch * rows, stride]: the weight, then, once it is rounded, minus its error
  int64_t stride;  // a multiple of 4
  const float* u;
  int64_t u_stride, u_batch;  // u_batch 0: all share one
  float* inverse;             // [factors, cols]: 1 / u's diagonal
  int64_t inverse_batch;
  const int* g_idx;  // [cols] or null: column / size
  int size;
  float* scale;        // [batch * rows, groups]
  int8_t* zero_point;  // likewise, or null
  int8_t* codes;       // [batch * rows, cols]
  float* loss;         // [batch * rows]
  int* status;
  // How scales are found.
  bool symmetric;
  float divisor;
  DType scale_dtype;
  int q_min, q_max;
  double search_range;
  int search_steps;
};

// values from w (rows w_stride apart, matrices w_batch), inverse, and the checks of both and g_idx.
cudaError_t sweep_prepare(const Sweep& sweep, const float* w, int64_t w_stride, int64_t w_batch,
                          int factors, cudaStream_t stream);

// The columns [first, first + width) take the errors of the columns [begin, end) before them.
cudaError_t sweep_update(const Sweep& sweep, int first, int width, int begin, int end,
                         cudaStream_t stream);

// The scale of the group that is [first, first + width), from the values as they are.
cudaError_t sweep_fit(const Sweep& sweep, int group, int first, int width, cudaStream_t stream);

// Rounds [first, first + width), at most kSweepCols. `fit`: its groups, of a multiple of kSweepFit
// columns, get their scales on the way.
cudaError_t sweep_stripe(const Sweep& sweep, int first, int width, bool fit, cudaStream_t stream);

}  // namespace qk::cuda
