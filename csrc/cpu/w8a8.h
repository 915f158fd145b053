// int8 weights times 8-bit activations: rows of x become codes, then tiles of (rows, 64 columns)
// are multiplied and scaled. Callers spread both steps over threads as they like.
//
// Codes of activations are unsigned, as the units for dot products want one of two operands: a row
// says which of its codes stands for zero, and sums are put right with those of the weight columns:
//
//   sum_k (code - offset) * w[n, k]  =  sum_k code * w[n, k]  -  offset * sum_k w[n, k]
//
// modulo 2^32, which is exact where the left side fits int32.
#pragma once

#include <cstdint>

#include "cpu/types.h"

namespace qk {

// Weights are packed by panels of so many columns of the result: words of four codes along K for
// each column, [K / 4][kPanel][4] bytes, zero beyond K and N, then the columns' int32 sums.
constexpr int64_t kPanel = 64;
constexpr int64_t w8a8_words(int64_t cols) { return (cols + 3) / 4; }
constexpr int64_t w8a8_panel_bytes(int64_t cols) { return (w8a8_words(cols) + 1) * 4 * kPanel; }

// Longest rows whose sums fit int32: of 128 * 128, and of (code - zero point) * w up to 255 * 128.
constexpr int64_t kMaxDepth = 0x7fffffff / (128 * 128);
constexpr int64_t kMaxAsymmetricDepth = 0x7fffffff / (255 * 128);

// Panel `panel` of codes [rows, cols] with `stride` between rows.
void w8a8_pack(const int8_t* codes, int64_t stride, int64_t rows, int64_t cols, int64_t panel,
               int8_t* packed);

// Activations [rows, cols], stride in elements.
struct Int8Input {
  DType dtype;  // kInt8: they are codes already
  const void* x;
  int64_t stride, cols;
  bool symmetric;
  // One scale (and zero point, or null) for all rows; null: each row gets its own.
  const float* scale;
  const int8_t* zero_point;
  // Columns that count as zero, in rising order.
  const int32_t* left_out;
  int64_t left_out_count;
};

// Quantized rows. A row takes w8a8_row_bytes, so that no two begin in the same set of a cache.
struct Int8Rows {
  uint8_t* codes;
  int64_t stride;
  float* scale;
  int32_t* offset;  // the code of zero
};
constexpr int64_t w8a8_row_bytes(int64_t cols) { return (cols + 63) / 64 * 64 + 64; }

// Rows [begin, end) by one panel.
struct Int8Task {
  Int8Rows rows;
  int64_t begin, end, cols;
  const int8_t* panel;
  const int8_t* next;  // the panel that follows, fetched meanwhile; null for none
  int32_t* sums;       // scratch: kPanel for each of the rows, and for no fewer than 8
  int64_t columns;     // of the panel that are columns of the result
  // Row r of the result begins at element r * stride. kInt8 stands for the int32 sums themselves.
  DType dtype;
  void* out;
  int64_t stride;
  const float* scale;  // of the weight's columns, or if `one_scale` of all
  bool one_scale;
  const void* bias;  // or null
  DType bias_dtype;
  // What else is added, times the weight's scale, before the bias; kPanel for each row. Or null.
  const float* more;
};

struct W8A8Kernels {
  // Rows [begin, end) of x. `scratch` holds a row of x if columns are left out.
  void (*quantize)(const Int8Input& input, int64_t begin, int64_t end, const Int8Rows& rows,
                   void* scratch);
  void (*multiply)(const Int8Task& task);
  // sums[r][n] = sum over i of x[r * count + i] * w[n, columns[i]], in this order, in fp32.
  void (*multiply_columns)(const int8_t* panel, const int32_t* columns, int64_t count,
                           const float* x, int64_t rows, float* sums);
};

// Those of the instruction set that dispatch.h chose.
const W8A8Kernels& w8a8_kernels();

}  // namespace qk
