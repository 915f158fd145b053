// The search for scales that make the least error: every block tries ranges shrunk by some ratios.
#pragma once

#include <cstdint>

#include "cpu/types.h"

namespace qk {

struct ScaleSearch {
  const float* shrink;  // ratios of the range, in (0, 1]
  int ratios;
  bool signs;  // also tries each scale negated, after all others; symmetric codes only
  int q_min, q_max;
  bool symmetric;
  float divisor;
  DType scale_dtype;
  float norm;  // the errors' exponent

  // How many scales a block tries.
  int tried() const { return signs ? 2 * ratios : ratios; }
};

struct SearchKernels {
  // Adds to sums[block][scale] what each of the scales costs over a row of blocks: x [rows, cols]
  // with `stride` in elements; `low` and `high` are the blocks' extremes (symmetric: `high` the
  // largest magnitude, `low` unused), `importance` [cols] or null weighs columns. The costs of a
  // block are in units of their own. `scratch` has search_scratch_floats.
  void (*losses)(DType dtype, const void* x, int64_t stride, int64_t rows, int64_t cols,
                 int64_t block_cols, const float* low, const float* high, const float* importance,
                 const ScaleSearch& how, float* scratch, double* sums);
  // The first of the cheapest scales of each block, and its zero point unless symmetric.
  void (*choose)(const float* low, const float* high, int64_t blocks, const double* sums,
                 const ScaleSearch& how, float* scratch, float* scale, int8_t* zero_point);
};

constexpr int64_t kSearchColumns = 512;  // so many numbers and their weights stay in the L1 cache

constexpr int64_t search_scratch_floats(const ScaleSearch& how) {
  return 2 * kSearchColumns + 4 * 2 * static_cast<int64_t>(how.ratios);
}

// Those of the instruction set that dispatch.h chose.
const SearchKernels& search_kernels();

}  // namespace qk
