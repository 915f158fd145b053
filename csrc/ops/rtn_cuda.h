// Round to nearest for the ops that differ only in what a block is.
#pragma once

#include "cuda/common/rtn.h"
#include "ops/cuda_tensor.h"

namespace qk::cuda {

// Fills out, scale and, unless symmetric, zero_point: in one kernel where the blocks allow it, else
// reduction, scale and codes one after the other.
void round_to_nearest(const char* op, const Matrix& x, const Blocks& blocks, const RtnArgs& args,
                      const Tensor& like, const Tensor& out, const Tensor& scale,
                      const Tensor& zero_point);

RtnArgs fp8_args(const char* op, ScalarType dtype);

}  // namespace qk::cuda
