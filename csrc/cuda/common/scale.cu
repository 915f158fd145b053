// Elementwise: scale = max(amax / divisor, smallest), and the asymmetric pair; the arithmetic is in
// quantizer.h.
#include "cuda/common/scale.h"

#include "cuda/common/quantizer.h"

namespace qk::cuda {
namespace {

__global__ void symmetric_scale_kernel(const float* amax, int64_t n, float divisor, DType dtype,
                                       float* scale) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += step) {
    scale[i] = symmetric_scale(amax[i], divisor, dtype);
  }
}

__global__ void asymmetric_scale_kernel(const float* low, const float* high, int64_t n, int q_min,
                                        int q_max, DType dtype, float* scale, int8_t* zero_point) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += step) {
    const ScaleAndZero result = asymmetric_scale(Range{low[i], high[i]}, q_min, q_max, dtype);
    scale[i] = result.scale;
    zero_point[i] = static_cast<int8_t>(result.zero_point);
  }
}

}  // namespace

cudaError_t make_symmetric_scale(const float* amax, int64_t n, float divisor, DType scale_dtype,
                                 float* scale, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  return launch(symmetric_scale_kernel, dim3(grid_extent(ceil_div(n, kThreads))), dim3(kThreads), 0,
                stream, amax, n, divisor, scale_dtype, scale);
}

cudaError_t make_asymmetric_scale(const float* low, const float* high, int64_t n, int q_min,
                                  int q_max, DType scale_dtype, float* scale, int8_t* zero_point,
                                  cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  return launch(asymmetric_scale_kernel, dim3(grid_extent(ceil_div(n, kThreads))), dim3(kThreads),
                0, stream, low, high, n, q_min, q_max, scale_dtype, scale, zero_point);
}

}  // namespace qk::cuda
