// Round to nearest in one pass over the weight: extremes, scale, codes and packing of a row of
// blocks while it is in cache.
#pragma once

#include <cstdint>

#include "cpu/reduce.h"
#include "cpu/types.h"

namespace qk {

struct RtnInt {
  int q_min, q_max;
  bool symmetric;
  float divisor;      // of symmetric scales
  DType scale_dtype;  // what the scale is rounded to
  int pack_bits;      // 0: int8 codes; 4 or 8: words as pack.h
};

// A row of blocks: x [rows, cols] with `stride` in elements, blocks of all its rows and
// `block_cols` columns. `scale` and `zero_point` get one value a block. Output row i begins at q +
// i * q_stride bytes.
struct BlockRow {
  const void* x;
  const void* next;  // x of the block row that follows, fetched meanwhile; null for none
  int64_t stride;
  int64_t rows, cols;
  int64_t block_cols;
  void* q;
  int64_t q_stride;
  float* scale;
  int8_t* zero_point;
};

struct RtnKernels {
  // `scratch` holds rtn_scratch_bytes(cols).
  void (*rtn_int)(DType dtype, const RtnInt& how, const BlockRow& block, void* scratch);
  void (*rtn_fp8)(DType dtype, DType format, const BlockRow& block, void* scratch);
};

// Folded columns, then the extremes of every block, then a row of codes to be packed.
constexpr int64_t rtn_scratch_bytes(int64_t cols) { return reduce_scratch_bytes(cols) + 9 * cols; }

// Those of the instruction set that dispatch.h chose.
const RtnKernels& rtn_kernels();

}  // namespace qk
