// The losses of many quantizations of a weight under a Gram matrix: sum of d g d^T over the rows
// d = Q(w * s) / s - w. Errors are made a panel of rows at a time and meet tiles of g while both
// are in cache; neither the errors nor d g are ever stored whole.
//
// g is symmetric: its diagonal is taken in fp32, and of the rest the upper triangle twice. Where
// bf16 units do the work, the largest part of g is split off first: g = V V^T + rest, the V of a
// pivoted Cholesky factorization that is stopped early. V's part is fp32, and what bf16 loses on
// the rest no longer matters, whatever a few loud channels or a common direction did to g.
#pragma once

#include <cstdint>

#include "cpu/types.h"

namespace qk {

struct AwqGram {
  bool pairs;  // words are two bf16 numbers, of consecutive rows, instead of one fp32 number
  int64_t cols;
  int64_t padded;         // columns, rounded up to tile_cols
  int factor_cols;        // of V, 0, 16 or 32
  const float* factors;   // V [cols][factor_cols]
  const float* across;    // V transposed, [factor_cols][padded]
  const float* diagonal;  // of g - V V^T
  void* words;            // stripes of tile_cols columns: awq_words_before
};

// Words before stripe `stripe`: each has the rows up to its last column, so many to a word.
constexpr int64_t awq_words_before(int64_t stripe, int64_t tile_cols, bool pairs) {
  return stripe * (stripe + 1) / 2 * tile_cols * tile_cols / (pairs ? 2 : 1);
}

struct AwqQuantizer {
  int64_t group;
  int q_min, q_max;
  bool symmetric;
  float divisor;
  DType scale_dtype;
};

// A block of rows under one candidate.
struct AwqRows {
  DType dtype;
  const void* w;
  int64_t stride, rows;
  const float *scale, *inverse;  // [cols]
  float clip;
};

struct AwqScratch {
  void* errors;     // zeros at first, rows rounded up to tile_rows: [rows][padded], bf16 for pairs
  float* values;    // [tile_rows][padded]
  float* extremes;  // [3][tile_rows][groups]
  int8_t* zero;     // [tile_rows][groups]
  float* sums;      // [rows, rounded up][16]
};

struct AwqKernels {
  int tile_rows, tile_cols;
  bool pairs;  // whether there are units for pairs of bf16 numbers
  // The stripe of columns [first, first + tile_cols) of g.
  void (*pack)(const AwqGram& gram, const float* g, int64_t stride, int64_t first);
  // Not finite if anything on the way was not.
  double (*loss)(const AwqGram& gram, const AwqQuantizer& how, const AwqRows& rows,
                 const AwqScratch& scratch);
};

// Those of the instruction set that dispatch.h chose.
const AwqKernels& awq_kernels();

}  // namespace qk
