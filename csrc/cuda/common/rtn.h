// Round to nearest in one pass: scale, codes and packing of each block while its elements are at
// hand.
#pragma once

#include "cuda/common/types.h"

namespace qk::cuda {

struct RtnArgs {
  DType code;  // kInt8 or an FP8
  int q_min, q_max;
  bool symmetric;
  float divisor;  // of symmetric scales
  DType scale_dtype;
  int pack_bits;  // 0: one byte for each code; 4, 8: words as pack_int32 makes them
};

// Whether `rtn` takes these blocks: of moderate size, starting at multiples of eight columns. For
// others: reduce, make_*_scale, quantize.
bool rtn_fits(const Blocks& blocks);

// scale fp32 and zero_point int8, one for each block; zero_point is not touched if symmetric.
cudaError_t rtn(const Matrix& x, const Blocks& blocks, const RtnArgs& args, void* out, float* scale,
                int8_t* zero_point, cudaStream_t stream);

}  // namespace qk::cuda
