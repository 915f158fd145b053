// Counts of values in bins of one width, mirrored at zero.
#pragma once

#include <cstdint>

#include "cpu/types.h"

namespace qk {

constexpr int kHistogramBins = 8192;

struct HistogramKernels {
  // Adds x [n] to the two tables, which together are the counts: bin 4096 + t of a number in
  // [t, t + 1) / bins, 4095 - t of its negative. |x| * bins is below 4096. Two tables, as adding to
  // one place twice takes longer than adding to two.
  void (*count)(DType dtype, const void* x, int64_t n, float bins, uint32_t* even, uint32_t* odd);
};

// Those of the instruction set that dispatch.h chose.
const HistogramKernels& histogram_kernels();

}  // namespace qk
