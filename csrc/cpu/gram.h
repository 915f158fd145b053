// The upper half of x^T x, in tiles over packed stripes of columns.
#pragma once

#include <cstdint>

#include "cpu/types.h"

namespace qk {

// A matrix by its rows, of which `tokens` says which ones, and in what order.
struct GramInput {
  DType dtype;
  const void* x;
  int64_t stride, cols;
  const int64_t* tokens;
};

struct GramKernels {
  int width;  // columns of a stripe
  // Tokens [begin, end) of x's `width` columns from `first` on, zero beyond the last column, as the
  // units take them: packed[word][width] in words of 32 bits, an odd last token of bf16 padded by a
  // zero. Of `channels`, which may be null, the three rows take in the columns' least number,
  // greatest number and sum of magnitudes.
  void (*pack)(const GramInput& input, int64_t begin, int64_t end, int64_t first, void* packed,
               float* channels);
  // g[i, j] += x^T x for the stripe's columns j from `first` on, and i <= j: rows above the
  // diagonal, and up to it within the tiles on it. `packed` holds stripes of `stripe` words each.
  // `fresh`: as if g were zeros, whatever it holds.
  void (*multiply)(DType dtype, const void* packed, int64_t stripe, int64_t tokens, int64_t first,
                   int64_t cols, bool fresh, float* g);
  // The upper half of g [n, n] onto kMirrorRows rows of the lower, from `first` on.
  void (*mirror)(float* g, int64_t n, int64_t first);
};

constexpr int64_t kMirrorRows = 64;

// Those of the instruction set that dispatch.h chose.
const GramKernels& gram_kernels();

}  // namespace qk
