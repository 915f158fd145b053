// What crosses the line between the torch boundary (csrc/ops/*_cuda.cpp) and the launchers: raw
// pointers, sizes, strides.
#pragma once

#include <cuda_runtime_api.h>  // also for files that g++ compiles

#include <cstdint>

#include "cpu/types.h"  // DType

namespace qk::cuda {

// Rows and columns are indexed with 32 bits inside a kernel, offsets with 64.
constexpr int64_t kMaxExtent = int64_t{1} << 30;

// A matrix in device memory; strides in elements, any of them.
struct Matrix {
  const void* data;
  DType dtype;
  int rows, cols;
  int64_t row_stride, col_stride;
};

// A grid of blocks over a matrix: rows x cols elements each, the last ones cut off by the matrix's
// edge.
struct Blocks {
  int rows, cols;
  int grid_rows, grid_cols;
};

// A block count is an int: the torch boundary refuses grids of more than kMaxExtent blocks.
__host__ __device__ inline int count(const Blocks& blocks) {
  return blocks.grid_rows * blocks.grid_cols;
}

}  // namespace qk::cuda
