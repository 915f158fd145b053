// Scales that balance activations and weights channel by channel.
#pragma once

#include "cuda/common/types.h"

namespace qk::cuda {

// Bits of the status word: which argument has a value that is negative or not finite.
constexpr int kBadActivation = 1, kBadWeight = 2;

// scale[i] = activation[i]^strength / weight[i]^(1 - strength), at least `minimum`; 1 where either
// is zero.
cudaError_t smooth_scales(const float* activation, const float* weight, int64_t n, double strength,
                          double minimum, float* scale, int* status, cudaStream_t stream);

}  // namespace qk::cuda
