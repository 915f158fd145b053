// What stands between the products of a layer, a row at a time: RMS norm, SiLU times up, rotary
// embedding. Each computes in fp32 and rounds once, to the dtype of what it reads.
#pragma once

#include <cstdint>

#include "cpu/types.h"

namespace qk {

struct PointwiseKernels {
  // out[i] = x[i] / sqrt(mean(x^2) + epsilon) * weight[i], all of `dtype`. With a `residual`, which
  // may be null, x is first x + residual, rounded to `dtype`, and stored to `sum`.
  void (*rms_norm)(DType dtype, const void* x, const void* residual, const void* weight, int64_t n,
                   float epsilon, void* sum, void* out);
  // out[i] = gate[i] / (1 + exp(-gate[i])) * up[i].
  void (*silu_mul)(DType dtype, const void* gate, const void* up, int64_t n, void* out);
  // The first 2 * half elements of x [size] turned: element i and i + half by the angle whose
  // cosine and sine stand at i, those of i + half by what stands there. The others stay.
  void (*rotate)(DType dtype, const void* x, const void* cosine, const void* sine, int64_t half,
                 int64_t size, void* out);
};

// Those of the instruction set that dispatch.h chose.
const PointwiseKernels& pointwise_kernels();

}  // namespace qk
