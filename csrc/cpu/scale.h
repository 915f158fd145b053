// Scales and zero points from reductions, in fp32, rounded to the dtype that will hold the scale.
#pragma once

#include <cstdint>

#include "cpu/types.h"

namespace qk {

struct ScaleKernels {
  // scale[i] = max(round(amax[i] / divisor), smallest scale of scale_dtype). NaN stays NaN.
  void (*symmetric)(const float* amax, int64_t n, float divisor, DType scale_dtype, float* scale);
  // Maps [min(low, 0), max(high, 0)] onto [q_min, q_max].
  void (*asymmetric)(const float* low, const float* high, int64_t n, int q_min, int q_max,
                     DType scale_dtype, float* scale, int8_t* zero_point);
};

// Those of the instruction set that dispatch.h chose.
const ScaleKernels& scale_kernels();

}  // namespace qk
