// Codes of x with given scales, and back.
#pragma once

#include <cstdint>

#include "cpu/types.h"

namespace qk {

// Scales (and int8 zero points, or null for none) of blocks [block_rows, block_cols], row-major,
// `cols` to a row.
struct Scales {
  const float* scale;
  const int8_t* zero_point;
  int64_t cols;
  int64_t block_rows, block_cols;
};

// A row-strided matrix (stride in elements) and the rows of it to work on.
struct Rows {
  const void* data;
  int64_t stride;
  int64_t cols;
  int64_t begin, end;
};

// Outputs are dense: row i begins at element i * cols.
struct QuantizeKernels {
  // clamp(round(x * (1 / scale)) + zero_point, q_min, q_max); NaN becomes the code of zero.
  void (*quantize_int)(DType dtype, Rows x, Scales grid, int q_min, int q_max, int8_t* q);
  // x * (1 / scale) as FP8 (`format`): saturating, to nearest even, NaN kept.
  void (*quantize_fp8)(DType dtype, Rows x, Scales grid, DType format, uint8_t* q);
  // (q - zero_point) * scale in fp32, rounded to `dtype`.
  void (*dequantize)(DType format, Rows q, Scales grid, DType dtype, void* out);
};

// Those of the instruction set that dispatch.h chose.
const QuantizeKernels& quantize_kernels();

}  // namespace qk
