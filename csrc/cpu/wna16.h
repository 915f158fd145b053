// Weight-only int4 and int8 GEMM: y = x W^T, W = (code - zero point) * scale. What is packed how:
// panel_gemm.h.
//
// One product takes: a PackedRows with `tile` and `depth` of the kernels, its tiles by `pack_tile`,
// then `gemm` for every panel of the weight, in any order and thread, over any range of tiles. All
// is raw pointers: an op over experts calls it for each one, with `order` naming its tokens.
#pragma once

#include <cstdint>

#include "cpu/panel_gemm.h"

namespace qk {

// `bits` 16 is a plain bf16 weight: one group, no scale.
struct Wna16Weight {
  int bits;  // 4, 8 or 16
  const int32_t* packed;
  int64_t rows, cols;  // N, K
  DType scale_dtype;
  const void* scale;         // [rows][groups], or [panels][groups][kPanelCols]
  const int8_t* zero_point;  // likewise, or null
  int64_t group, groups;     // k of a group
  bool by_panels;            // the latter
};

// int32 words [rows][stride] as compressed-tensors has them: code + 2^(bits - 1), along K. For 16
// bits they are bf16 numbers, which `stride` counts, and there is no perm.
struct Wna16Words {
  int bits;
  const void* words;
  int64_t stride, rows, cols;
  const int32_t* perm;  // null, or which column of the weight is the k-th
};

struct Wna16Kernels {
  int64_t tile;  // rows of x at a time
  // Words of 32 bits that a packed row of x takes.
  int64_t (*depth)(const Wna16Weight& weight, DType x);
  // Tile `t`, and the sums if x.sums is there. `row` is room for 2 * depth + 16 numbers.
  void (*pack_tile)(const Wna16Weight& weight, const RowsInput& input, const PackedRows& x,
                    int64_t t, float* row);
  // y of a panel of the weight for the tiles [first_tile, end_tile) of x, which was of type
  // `dtype`.
  void (*gemm)(const Wna16Weight& weight, DType dtype, const PackedRows& x, int64_t panel,
               int64_t first_tile, int64_t end_tile, const PanelOutput& out);
  // A panel of a weight: packed [steps][kPanelCols]. `room` is for 16 * steps words.
  void (*pack)(const Wna16Words& words, int64_t panel, int32_t* room, int32_t* packed);
};

// k of a packed word, and words of a packed channel.
inline int64_t wna16_step(int bits) { return 32 / bits; }
inline int64_t wna16_steps(int bits, int64_t cols) { return (cols * bits + 31) / 32; }
// Whether x's sums over the groups are needed.
inline bool wna16_sums(const Wna16Weight& weight) {
  return weight.zero_point && (weight.groups == 1 || weight.group % wna16_step(weight.bits) == 0);
}

// Those of the instruction set that dispatch.h chose.
const Wna16Kernels& wna16_kernels();

}  // namespace qk
