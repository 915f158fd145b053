// Checked tensors as the CPU kernels take them.
#pragma once

#include "cpu/quantize.h"
#include "ops/cpu_ops.h"

namespace qk::cpu {

inline Scales scales_of(const Grid& grid, const Tensor& scale,
                        const std::optional<Tensor>& zero_point) {
  return {static_cast<const float*>(scale.const_data_ptr()),
          zero_point ? static_cast<const int8_t*>(zero_point->const_data_ptr()) : nullptr,
          grid.cols, grid.block_rows, grid.block_cols};
}

inline Rows rows_of(const Tensor& x, int64_t begin, int64_t end) {
  return {x.const_data_ptr(), x.stride(0), x.size(1), begin, end};
}

}  // namespace qk::cpu
