// 16 x 16 numbers the other way round, unless the ISA's own header has done it.
#pragma once

#ifndef QK_TRANSPOSE
namespace qk::QK_ISA {
namespace {

// out[i][j] = x[j][i].
inline void transpose(const float* x, int64_t x_stride, float* out, int64_t out_stride) {
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < kLanes; ++j) out[i * out_stride + j] = x[j * x_stride + i];
  }
}

}  // namespace
}  // namespace qk::QK_ISA
#endif
