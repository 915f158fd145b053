// See scale.h.
#pragma once

#include "cpu/numeric.inl"
#include "cpu/scale.h"

namespace qk::QK_ISA {
namespace {

// An all-zero block gets the smallest scale, so that 1 / scale is finite; fp16 cannot hold less
// than 2^-24.
QK_INLINE float smallest_scale(Half) { return 0x1p-24f; }
template <class T>
QK_INLINE float smallest_scale(T) {
  return 0x1p-100f;
}
template <class T>
QK_INLINE F32 finish_scale(F32 scale, T dtype) {
  return max(broadcast(smallest_scale(dtype)), round_to(scale, dtype));
}

inline void symmetric_scales(const float* amax, int64_t n, float divisor, DType scale_dtype,
                             float* scale) {
  visit_float(scale_dtype, [&](auto dtype) {
    for_lanes(n, [&](int64_t i, auto lanes) {
      store(scale + i, finish_scale(load(amax + i, lanes) / broadcast(divisor), dtype), lanes);
    });
  });
}

inline void asymmetric_scales(const float* low, const float* high, int64_t n, int q_min, int q_max,
                              DType scale_dtype, float* scale, int8_t* zero_point) {
  const F32 zero = broadcast(0.0f), steps = broadcast(static_cast<float>(q_max - q_min));
  visit_float(scale_dtype, [&](auto dtype) {
    for_lanes(n, [&](int64_t i, auto lanes) {
      const F32 least = min(zero, load(low + i, lanes)), most = max(zero, load(high + i, lanes));
      const F32 step = finish_scale((most - least) / steps, dtype);
      // Clamped before it is rounded: the bounds are integers, so the result is the same and the
      // conversion is safe.
      const F32 offset = max(zero - steps, min(zero, least / step));
      const I32 code = select(is_nan(offset), broadcast(0), broadcast(q_min) - round(offset));
      store(scale + i, step, lanes);
      store_bytes(zero_point + i, code, lanes);
    });
  });
}

}  // namespace
}  // namespace qk::QK_ISA
