#include "cuda/common/smooth.h"

#include "cuda/common/intrinsics.h"

namespace qk::cuda {
namespace {

__device__ bool usable(float x) { return x >= 0.0f && bits_of(x) != 0x7F800000u; }

// In fp64 no fp32 number makes either power vanish or overflow.
__global__ void __launch_bounds__(kThreads)
    smooth_kernel(const float* activation, const float* weight, int64_t n, double strength,
                  double minimum, float* scale, int* status) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < n; i += step) {
    const float a = activation[i], w = weight[i];
    if (!usable(a)) atomic_or(status, kBadActivation);
    if (!usable(w)) atomic_or(status, kBadWeight);
    if (a == 0.0f || w == 0.0f) {
      scale[i] = 1.0f;
      continue;
    }
    const double ratio =
        pow(static_cast<double>(a), strength) / pow(static_cast<double>(w), 1.0 - strength);
    const double most = static_cast<double>(float_of(0x7F7FFFFFu));
    scale[i] = static_cast<float>(fmin(fmax(ratio, minimum), most));
  }
}

}  // namespace

cudaError_t smooth_scales(const float* activation, const float* weight, int64_t n, double strength,
                          double minimum, float* scale, int* status, cudaStream_t stream) {
  return launch(smooth_kernel, dim3(grid_extent(ceil_div(n, kThreads))), dim3(kThreads), 0, stream,
                activation, weight, n, strength, minimum, scale, status);
}

}  // namespace qk::cuda
