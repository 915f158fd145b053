// y = x W^T for weights that are decoded on the way: what the GEMMs of WNA16, bf16 and FP8 weights
// share (panel_gemm.inl).
//
// A weight is packed as words of 32 bits, [panels][steps][kPanelCols]: a panel is 64 output
// channels side by side, a step so many k as a word has codes of one channel: 8 of 4 bits, 4 of 8,
// 2 of 16. Of a word's codes the even k are in its lower 16 bits, from the lowest up, and the odd k
// in its upper 16.
//
// x is packed as tiles of a few rows, balanced; a tile is [depth][rows of the tile] words, a word a
// pair of bf16 numbers or one fp32 number, k beyond the last zero.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/types.h"

namespace qk {

constexpr int64_t kPanelCols = 64;

// A matrix by its rows. If not null, `order` says which of them are taken, `perm` in what order the
// columns are.
struct RowsInput {
  DType dtype;
  const void* x;
  int64_t stride, cols;
  const int32_t* perm;
  const int32_t* order;
};

// x as the kernels take it. `sums` [rows][groups] of x over each group, null if nobody asks.
struct PackedRows {
  void* words;
  float* sums;
  int64_t rows, depth;  // words of a row
  int64_t tile, group, groups;

  int64_t tiles() const { return (rows + tile - 1) / tile; }
  int64_t first_row(int64_t t) const { return rows * t / tiles(); }
};

// y [rows][stride]: bias of y's dtype or fp32, or null.
struct PanelOutput {
  DType dtype, bias_dtype;
  void* y;
  const void* bias;
  int64_t stride, cols;
};

}  // namespace qk
