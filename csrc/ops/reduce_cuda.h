// Reductions for the ops that need one on the way to something else.
#pragma once

#include "cuda/common/reduce.h"
#include "ops/cuda_tensor.h"

namespace qk::cuda {

// Reduces x to whichever outputs are not null, through a workspace beside `like` if two steps are
// better.
void reduce_blocks(const char* op, const Matrix& x, const Blocks& blocks, const ReduceOutput& out,
                   const Tensor& like);

}  // namespace qk::cuda
