// A tensor as the copies of sm_90 see it: rows of bytes, the tiles that are taken of it, and how
// these lie in shared memory.
#pragma once

#include "cuda/common/launch.h"

#ifdef __CUDACC__
#include <cuda.h>
#endif

namespace qk::cuda::sm90 {

// The rows of a tile are as wide as what is swizzled in shared memory: of each 8 rows, row r has
// its chunks of 16 bytes at places c ^ r.
constexpr int kTileRowBytes = 128;

// Offset, from a multiple of 1024, of the byte that would be there without a swizzle.
__host__ __device__ inline uint32_t swizzled(uint32_t offset) {
  return offset ^ (offset >> 7 & 7u) << 4;
}

struct TensorShape {
  const void* data;   // 16 bytes aligned
  int rank;           // 2 or 4
  int64_t extent[4];  // the first in bytes
  int64_t stride[4];  // bytes, multiples of 16; the first is 1
  int box[4];         // the first kTileRowBytes, none above 256
};

#ifdef __CUDACC__
using TensorMap = CUtensorMap;
#else
struct TensorMap {
  TensorShape shape;
};
#endif

// An error if the driver has no such maps, or the shape cannot be had.
cudaError_t make_tensor_map(const TensorShape& shape, TensorMap* map);

}  // namespace qk::cuda::sm90
