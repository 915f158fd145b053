// Minimum, maximum and largest magnitude of each block of a matrix. NaN propagates; the order of
// reduction is fixed.
#pragma once

#include "cuda/common/types.h"

namespace qk::cuda {

// Contiguous fp32 [grid_rows, grid_cols] each; null for what is not wanted.
struct ReduceOutput {
  float* absmax;
  float* low;
  float* high;
};

// Few large blocks are reduced in two steps, so that the whole device has work: first to the blocks
// of `tiles`, then these to the result. One step if `tiles` are the blocks asked for.
struct ReducePlan {
  Blocks tiles;
  Blocks rest;  // over the grid of tiles
  bool two_steps;
};

ReducePlan plan_reduce(int rows, int cols, const Blocks& blocks);

// One step of a plan.
cudaError_t reduce(const Matrix& x, const Blocks& blocks, const ReduceOutput& out,
                   cudaStream_t stream);

}  // namespace qk::cuda
