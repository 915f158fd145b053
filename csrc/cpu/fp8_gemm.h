// FP8 weights (e4m3fn) times x as it is, or times FP8 codes of x: y = x W^T, W = code * scale.
// Every code is exact in bf16 and in fp32: sums are fp32 sums of exact products, and scales
// multiply sums.
//
// One product takes: a plan, a PackedRows as it says, its tiles by `pack_tile`, then `gemm` for
// every panel of the weight, in any order and thread, over any range of tiles. All is raw pointers:
// an op over experts calls it for each one.
#pragma once

#include <cstdint>

#include "cpu/panel_gemm.h"
#include "cpu/types.h"

namespace qk {

// `packed` is [panels][steps + 1][kPanelCols] words of four codes: the first k and the third, the
// second and the fourth, zero beyond N and K. The last row of words is fp32: NaN for a column with
// a NaN, else zero, so that the kernels need not know the code of NaN.
constexpr int64_t fp8_steps(int64_t cols) { return (cols + 3) / 4; }
constexpr int64_t fp8_panel_bytes(int64_t cols) { return (fp8_steps(cols) + 1) * 4 * kPanelCols; }

// Panel `panel` of codes [rows, cols] with `stride` between rows.
void fp8_pack(const uint8_t* codes, int64_t stride, int64_t rows, int64_t cols, int64_t panel,
              uint8_t* packed);

// Scales [blocks of rows][scale_cols] of blocks [block_rows, block_cols].
struct Fp8Weight {
  const uint8_t* packed;
  int64_t rows, cols;  // N, K
  const float* scale;
  int64_t scale_cols, block_rows, block_cols;
};

// How x becomes codes, if it does: with the scale that is given, or one for each `group` columns of
// a row (at least K: one a row).
struct Fp8Quantizer {
  bool quantized;
  const float* scale;  // null: made of the numbers
  int64_t group;
};

// How a weight and an x meet. `size`: k of a segment, over which all scales are the same.
struct Fp8Plan {
  bool pairs;   // words of x and of decoded weights are pairs of bf16
  bool apart;   // blocks or groups end inside a word: numbers are scaled one by one
  bool scaled;  // x's segments have scales, which are its PackedRows' `sums`
  int64_t size, groups, depth;
};

struct Fp8Kernels {
  int64_t tile;  // rows of x at a time
  Fp8Plan (*plan)(const Fp8Weight& weight, const Fp8Quantizer& how, DType x);
  // Tile `t` of x. `room` holds fp8_room_bytes(K).
  void (*pack_tile)(const Fp8Plan& plan, const Fp8Quantizer& how, const RowsInput& input,
                    const PackedRows& x, int64_t t, char* room);
  // y of a panel of the weight for the tiles [first_tile, end_tile) of x.
  void (*gemm)(const Fp8Plan& plan, const Fp8Weight& weight, const PackedRows& x, int64_t panel,
               int64_t first_tile, int64_t end_tile, const PanelOutput& out);
};

int64_t fp8_room_bytes(int64_t cols);

// Those of the instruction set that dispatch.h chose.
const Fp8Kernels& fp8_gemm_kernels();

}  // namespace qk
