// absmax and min/max over blocks of a row-strided matrix. NaN propagates; -0 counts as less than 0.
#pragma once

#include <cstdint>

#include "cpu/types.h"

namespace qk {

struct ReduceKernels {
  // One row of blocks: x [rows, cols] with `row_stride` in elements -> one value for each
  // `block_cols` columns. `scratch` holds reduce_scratch_bytes(cols) and is not touched if rows
  // is 1. rows and cols are positive.
  void (*absmax)(DType dtype, const void* x, int64_t row_stride, int64_t rows, int64_t cols,
                 int64_t block_cols, void* scratch, float* out);
  void (*minmax)(DType dtype, const void* x, int64_t row_stride, int64_t rows, int64_t cols,
                 int64_t block_cols, void* scratch, float* low, float* high);
};

constexpr int64_t reduce_scratch_bytes(int64_t cols) { return 2 * (cols * 4 + 64); }

// Those of the instruction set that dispatch.h chose.
const ReduceKernels& reduce_kernels();

}  // namespace qk
