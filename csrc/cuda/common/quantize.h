// Codes with given scales, and back. Scales and zero points are contiguous, one for each block;
// zero_point may be null.
#pragma once

#include "cuda/common/types.h"

namespace qk::cuda {

struct QuantizeArgs {
  Blocks blocks;
  const float* scale;
  const int8_t* zero_point;
  DType code;        // kInt8 or an FP8
  int q_min, q_max;  // of kInt8
  int pack_bits;     // 0: one byte for each code; 4, 8: words as pack_int32 makes them
};

cudaError_t quantize(const Matrix& x, const QuantizeArgs& args, void* out, cudaStream_t stream);

// `out` is contiguous [rows, cols] of `out_dtype`.
cudaError_t dequantize(const Matrix& q, const Blocks& blocks, const float* scale,
                       const int8_t* zero_point, void* out, DType out_dtype, cudaStream_t stream);

}  // namespace qk::cuda
