// The upper half of x^T x, in tiles over packed panels of 16 columns.
#pragma once

#include <cstdint>

#include "cpu/types.h"

namespace qk {

struct GramKernels {
  int tile_cols;  // columns of a stripe, a multiple of 16
  // Tokens [0, tokens) of x's 16 columns from `first` on, zero beyond `cols`, as the units take
  // them: packed has 16 * tokens words of 32 bits, an odd last token of bf16 padded by a zero.
  void (*pack)(DType dtype, const void* x, int64_t stride, int64_t tokens, int64_t first,
               int64_t cols, void* packed);
  // g[i, j] += x^T x for the stripe's columns j from `first` on, and i <= j: rows above the
  // diagonal, and up to it within the tiles on it. `packed` holds panels of `panel` words each.
  void (*stripe)(DType dtype, const void* packed, int64_t panel, int64_t tokens, int64_t first,
                 int64_t cols, float* g);
};

// Those of the instruction set that dispatch.h chose.
const GramKernels& gram_kernels();

}  // namespace qk
