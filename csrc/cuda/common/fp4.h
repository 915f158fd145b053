// FP4 (e2m1) codes, two in a byte, the even column's in the lower half.
#pragma once

#include "cuda/common/types.h"

namespace qk::cuda {

// x [rows, cols], cols even; fp32 scale [rows, scale_cols] of groups of `group` columns, an even
// number -> bytes [rows, cols / 2]. Codes are those of x / scale, a division; NaN is zero.
cudaError_t quantize_fp4(const Matrix& x, const float* scale, int scale_cols, int group,
                         void* bytes, cudaStream_t stream);

// Bytes [rows, cols / 2], with a stride between rows -> e4m3 codes [rows, cols].
cudaError_t unpack_fp4(const void* bytes, int64_t row_stride, int rows, int cols, void* codes,
                       cudaStream_t stream);

}  // namespace qk::cuda
