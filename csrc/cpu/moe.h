// What the GEMMs over experts do besides the single ones.
#pragma once

#include <cstdint>

#include "cpu/types.h"

namespace qk {

struct MoeKernels {
  // y[r][c] = fp32(y[r][c]) * scale[r], rounded to `dtype`, for rows [begin, end) and the `cols`
  // columns from `y` on; row r begins at element r * stride.
  void (*scale_rows)(DType dtype, void* y, int64_t stride, int64_t begin, int64_t end, int64_t cols,
                     const float* scale);
};

// Those of the instruction set that dispatch.h chose.
const MoeKernels& moe_kernels();

}  // namespace qk
