// See search.h. A piece of a block lies in the L1 cache as fp32 while all scales are tried on it.
#pragma once

#include <limits>

#include "cpu/scale_impl.h"
#include "cpu/search.h"

namespace qk::QK_ISA {
namespace {

// |x|^norm for |x| < 2^8, to some 1e-5 of it: norm * log2|x|, then two to that.
struct Power {
  // (log2(1 + f) = f * (a + b f + ...) for 1 + f in [sqrt(1/2), sqrt(2)], within 3e-6) * norm.
  explicit QK_INLINE Power(float exponent)
      : norm(broadcast(exponent)), offset(broadcast(-127.0f * exponent)) {
    constexpr float kLog[] = {1.4427134f,   -0.7211323f, 0.47934967f,
                              -0.36748374f, 0.32214302f, -0.2066053f};
    for (int i = 0; i < 6; ++i) log[i] = broadcast(kLog[i] * exponent);
  }
  QK_INLINE F32 operator()(F32 x) const {
    constexpr int kRootOfHalf = 0x3f3504f3;
    const I32 shifted = bits(magnitude(x)) + broadcast(0x3f800000 - kRootOfHalf);
    const F32 exponent = to_float(shift_right<23>(shifted));
    const F32 f =
        from_bits((shifted & broadcast(0x7fffff)) + broadcast(kRootOfHalf)) - broadcast(1.0f);
    F32 p = log[5];
#pragma GCC unroll 5
    for (int i = 4; i >= 0; --i) p = multiply_add(p, f, log[i]);
    const F32 y = max(multiply_add(f, p, multiply_add(exponent, norm, offset)), broadcast(-126.0f));
    // 2^whole goes into the exponent of 2^(y - whole), |y - whole| <= 1/2; within 3e-6 of it.
    const I32 whole = round(y);
    const F32 rest = y - to_float(whole);
    F32 e = multiply_add(rest, broadcast(0.009570102f), broadcast(0.055917863f));
    e = multiply_add(e, rest, broadcast(0.24024744f));
    e = multiply_add(e, rest, broadcast(0.6931218f));
    e = multiply_add(e, rest, broadcast(0.9999993f));
    return from_bits(bits(e) + shift_left<23>(whole));
  }
  F32 norm, offset, log[6];
};
struct Square {
  QK_INLINE F32 operator()(F32 x) const { return x * x; }
};

// Sum of loss(error) * weights over n numbers, a multiple of kLanes. `least` and `most` bound the
// codes less the zero point. With two sums, an addition need not wait for the one before.
template <bool kWeighted, class Loss>
QK_INLINE float loss_of(const float* values, const float* weights, int64_t n, float scale,
                        float least, float most, const Loss& loss) {
  const F32 step = broadcast(scale), inverse = broadcast(1.0f / scale);
  const F32 low = broadcast(least), high = broadcast(most);
  const auto add = [&](int64_t i, F32 sum) {
    const F32 x = load(values + i, Full{});
    const F32 code = to_float(round(max(low, min(high, x * inverse))));
    const F32 cost = loss(multiply_add(code, step, broadcast(0.0f) - x));
    return kWeighted ? multiply_add(cost, load(weights + i, Full{}), sum) : cost + sum;
  };
  F32 even = broadcast(0.0f), odd = even;
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    even = add(i, even);
    odd = add(i + kLanes, odd);
  }
  if (i < n) even = add(i, even);
  float lanes[kLanes];
  store(lanes, even + odd, Full{});
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int k = 0; k < width; ++k) lanes[k] += lanes[k + width];
  }
  return lanes[0];
}

// The scales that a block tries, and their zero points. `scratch` has 4 floats a scale.
struct Candidates {
  float* scale;
  int8_t* zero;  // null if symmetric
};
inline Candidates candidates_of(float low, float high, const ScaleSearch& how, float* scratch) {
  const int n = how.ratios;
  float *const scale = scratch, *const highs = scratch + 2 * n, *const lows = highs + n;
  int8_t* const zero = reinterpret_cast<int8_t*>(lows + n);
  for (int i = 0; i < n; ++i) highs[i] = high * how.shrink[i];
  if (how.symmetric) {
    symmetric_scales(highs, n, how.divisor, how.scale_dtype, scale);
    for (int i = 0; how.signs && i < n; ++i) scale[n + i] = -scale[i];
    return {scale, nullptr};
  }
  for (int i = 0; i < n; ++i) lows[i] = low * how.shrink[i];
  asymmetric_scales(lows, highs, n, how.q_min, how.q_max, how.scale_dtype, scale, zero);
  return {scale, zero};
}

// The power of two that brings x near 1, so that powers of errors neither overflow nor vanish. It
// changes no digit of anything.
inline float unit_of(float x) {
  uint32_t word;
  std::memcpy(&word, &x, sizeof(word));
  const int exponent = static_cast<int>(word >> 23 & 0xff);
  const uint32_t inverse = static_cast<uint32_t>(exponent < 1     ? 253
                                                 : exponent > 252 ? 1
                                                                  : 254 - exponent)
                           << 23;
  float unit;
  std::memcpy(&unit, &inverse, sizeof(unit));
  return unit;
}

template <bool kWeighted, class T, class Loss>
void losses_by(const T* x, int64_t stride, int64_t rows, int64_t cols, int64_t block_cols,
               const float* low, const float* high, const float* importance, const ScaleSearch& how,
               float* scratch, double* sums, const Loss& loss) {
  float *const values = scratch, *const weights = scratch + kSearchColumns;
  const int tried = how.tried();
  for_groups(cols, block_cols, [&](int64_t g, int64_t first, int64_t count) {
    const float least = low ? low[g] : 0.0f;
    const Candidates all = candidates_of(least, high[g], how, scratch + 2 * kSearchColumns);
    const float unit = unit_of(-least > high[g] ? -least : high[g]);
    const F32 units = broadcast(unit);
    for (int64_t begin = first; begin < first + count; begin += kSearchColumns) {
      const int64_t left = first + count - begin, n = left < kSearchColumns ? left : kSearchColumns;
      const int64_t padded = (n + kLanes - 1) / kLanes * kLanes;
      // Lanes beyond the end are zeros, which cost nothing or, weighted, count for nothing.
      if (kWeighted) {
        for_lanes(n, [&](int64_t i, auto lanes) {
          store(weights + i, load(importance + begin + i, lanes), Full{});
        });
      }
      for (int64_t r = 0; r < rows; ++r) {
        const T* row = x + r * stride + begin;
        for_lanes(n, [&](int64_t i, auto lanes) {
          store(values + i, load(row + i, lanes) * units, Full{});
        });
        for (int i = 0; i < tried; ++i) {
          const float zero = all.zero ? static_cast<float>(all.zero[i]) : 0.0f;
          sums[g * tried + i] += static_cast<double>(loss_of<kWeighted>(
              values, weights, padded, all.scale[i] * unit, static_cast<float>(how.q_min) - zero,
              static_cast<float>(how.q_max) - zero, loss));
        }
      }
    }
  });
}

template <class T>
void block_row_losses(const T* x, int64_t stride, int64_t rows, int64_t cols, int64_t block_cols,
                      const float* low, const float* high, const float* importance,
                      const ScaleSearch& how, float* scratch, double* sums) {
  const auto by = [&](const auto& loss) {
    if (importance) {
      losses_by<true>(x, stride, rows, cols, block_cols, low, high, importance, how, scratch, sums,
                      loss);
    } else {
      losses_by<false>(x, stride, rows, cols, block_cols, low, high, importance, how, scratch, sums,
                       loss);
    }
  };
  if (how.norm == 2.0f) {
    by(Square());
  } else {
    by(Power(how.norm));
  }
}

void choose_scales(const float* low, const float* high, int64_t blocks, const double* sums,
                   const ScaleSearch& how, float* scratch, float* scale, int8_t* zero_point) {
  const int tried = how.tried();
  for (int64_t g = 0; g < blocks; ++g) {
    const Candidates all = candidates_of(low ? low[g] : 0.0f, high[g], how, scratch);
    // A loss that is NaN or infinite, of a scale that its dtype cannot hold, never wins.
    double least = std::numeric_limits<double>::infinity();
    int best = 0;
    for (int i = 0; i < tried; ++i) {
      if (sums[g * tried + i] < least) least = sums[g * tried + i], best = i;
    }
    scale[g] = all.scale[best];
    if (all.zero) zero_point[g] = all.zero[best];
  }
}

}  // namespace
}  // namespace qk::QK_ISA
