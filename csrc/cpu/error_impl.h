// See error.h. Sixteen running sums a row, added up in a fixed order: the result does not depend on
// ISA or threads.
#pragma once

#include "cpu/error.h"
#include "cpu/quantize_impl.h"

namespace qk::QK_ISA {
namespace {

struct ErrorSums {
  F64 error = zero_sums(), source = zero_sums();
  I32 most_error = broadcast(0),
      most_source = broadcast(0);  // bits of magnitudes: their order is that of integers

  template <class Lanes>
  QK_INLINE void add(F32 x, F32 x_hat, Lanes lanes) {
    const F32 difference = keep(x - x_hat, lanes);
    error = add_square(error, difference);
    source = add_square(source, x);
    most_error = max(most_error, bits(magnitude(difference)));
    most_source = max(most_source, bits(magnitude(x)));
  }
};

QK_INLINE double total(F64 sums) {
  double v[kLanes];
  store(v, sums);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) v[i] += v[i + width];
  }
  return v[0];
}

QK_INLINE double largest(I32 magnitudes) {
  float v[kLanes];
  store(v, from_bits(magnitudes), Full{});
  for (int i = 1; i < kLanes; ++i) v[0] = v[0] > v[i] || v[0] != v[0] ? v[0] : v[i];
  return v[0];
}

template <class T, class Format>
void row_error(const T* x, const uint8_t* q, int64_t cols, int64_t group, const float* scale,
               const int8_t* zero_point, Format format, double* out) {
  ErrorSums sums;
  if (group == 1) {
    for_lanes(cols, [&](int64_t i, auto lanes) {
      const F32 zero = zero_point ? to_float(load_signed(zero_point + i, lanes)) : broadcast(0.0f);
      const F32 x_hat = (decode(load_signed(q + i, lanes), format) - zero) * load(scale + i, lanes);
      sums.add(load(x + i, lanes), x_hat, lanes);
    });
  } else {
    for_groups(cols, group, [&](int64_t g, int64_t first, int64_t n) {
      const F32 step = broadcast(scale[g]),
                zero = broadcast(zero_point ? static_cast<float>(zero_point[g]) : 0.0f);
      for_lanes(n, [&](int64_t i, auto lanes) {
        const F32 x_hat = (decode(load_signed(q + first + i, lanes), format) - zero) * step;
        sums.add(load(x + first + i, lanes), x_hat, lanes);
      });
    });
  }
  out[0] = total(sums.error);
  out[1] = total(sums.source);
  out[2] = largest(sums.most_error);
  out[3] = largest(sums.most_source);
}

}  // namespace
}  // namespace qk::QK_ISA
