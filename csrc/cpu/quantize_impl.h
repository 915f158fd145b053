// See quantize.h. Each operation exists for a run of elements that share a scale, and for one scale
// per element.
#pragma once

#include "cpu/numeric.inl"
#include "cpu/quantize.h"

namespace qk::QK_ISA {
namespace {

// round(x) + zero_point within [q_min, q_max], in the lowest byte; `least` and `most` are the
// bounds less the zero point. Clamped before it is rounded: the bounds are integers, so the result
// is the same and the conversion cannot overflow. NaN passes through (it is the second operand) and
// `round` makes its lowest byte 0, the code of zero.
QK_INLINE I32 int_code(F32 x, F32 least, F32 most, I32 zero_point) {
  return round(max(least, min(most, x))) + zero_point;
}

// The same with a scale and zero point for every element, and for zero points outside of [q_min,
// q_max].
QK_INLINE I32 int_code_each(F32 x, I32 zero_point, int q_min, int q_max) {
  const I32 low = broadcast(q_min), high = broadcast(q_max);
  const I32 code = int_code(x, to_float(low - zero_point), to_float(high - zero_point), zero_point);
  return select(is_nan(x), max(low, min(high, zero_point)), code);
}

// `ahead` as in map_bytes.
template <class T>
void row_quantize_int(const T* x, const T* ahead, int64_t cols, int64_t group, const float* scale,
                      const int8_t* zero_point, int q_min, int q_max, int8_t* q) {
  if (group == 1) {
    for_lanes(cols, [&](int64_t i, auto lanes) {
      const I32 zero = zero_point ? load_signed(zero_point + i, lanes) : broadcast(0);
      const F32 scaled = load(x + i, lanes) * (broadcast(1.0f) / load(scale + i, lanes));
      store_bytes(q + i, int_code_each(scaled, zero, q_min, q_max), lanes);
    });
    return;
  }
  const auto span = [=](int64_t g, int64_t first, int64_t n, F32 least, F32 most, I32 zero) {
    const F32 inverse = broadcast(1.0f / scale[g]);
    map_bytes(x + first, ahead ? ahead + first : nullptr, n, q + first,
              [=](F32 v) { return int_code(v * inverse, least, most, zero); });
  };
  const F32 low = broadcast(static_cast<float>(q_min)), high = broadcast(static_cast<float>(q_max));
  if (!zero_point) {
    return for_groups(cols, group, [=](int64_t g, int64_t first, int64_t n) {
      span(g, first, n, low, high, broadcast(0));
    });
  }
  for_groups(cols, group, [=](int64_t g, int64_t first, int64_t n) {
    const I32 zero = broadcast(static_cast<int>(zero_point[g]));
    if (zero_point[g] >= q_min && zero_point[g] <= q_max) {
      span(g, first, n, low - to_float(zero), high - to_float(zero), zero);
    } else {
      const F32 inverse = broadcast(1.0f / scale[g]);
      map_bytes<T>(x + first, nullptr, n, q + first,
                   [=](F32 v) { return int_code_each(v * inverse, zero, q_min, q_max); });
    }
  });
}

// `kFitted` promises that the scales come from the absmax of their blocks: where one is finite, its
// block holds no NaN and nothing beyond the range.
template <bool kFitted, class T, class Format>
void row_quantize_fp8(const T* x, const T* ahead, int64_t cols, int64_t group, const float* scale,
                      Format format, uint8_t* q) {
  if (group == 1) {
    for_lanes(cols, [&](int64_t i, auto lanes) {
      const F32 scaled = load(x + i, lanes) * (broadcast(1.0f) / load(scale + i, lanes));
      store_bytes(q + i, encode<Format, false>(scaled, format), lanes);
    });
    return;
  }
  for_groups(cols, group, [&](int64_t g, int64_t first, int64_t n) {
    const F32 inverse = broadcast(1.0f / scale[g]);
    const T* soon = ahead ? ahead + first : nullptr;
    if (kFitted && scale[g] - scale[g] == 0.0f) {
      map_bytes(x + first, soon, n, q + first,
                [=](F32 v) { return encode<Format, true>(v * inverse, format); });
    } else {
      map_bytes(x + first, soon, n, q + first,
                [=](F32 v) { return encode<Format, false>(v * inverse, format); });
    }
  });
}

template <class Format, class T>
void row_dequantize(const uint8_t* q, int64_t cols, int64_t group, const float* scale,
                    const int8_t* zero_point, Format format, T* out) {
  if (group == 1) {
    for_lanes(cols, [&](int64_t i, auto lanes) {
      const F32 zero = zero_point ? to_float(load_signed(zero_point + i, lanes)) : broadcast(0.0f);
      store(out + i, (decode(load_signed(q + i, lanes), format) - zero) * load(scale + i, lanes),
            lanes);
    });
    return;
  }
  for_groups(cols, group, [&](int64_t g, int64_t first, int64_t n) {
    const F32 step = broadcast(scale[g]),
              zero = broadcast(zero_point ? static_cast<float>(zero_point[g]) : 0.0f);
    for_lanes(n, [&](int64_t i, auto lanes) {
      store(out + first + i, (decode(load_signed(q + first + i, lanes), format) - zero) * step,
            lanes);
    });
  });
}

// f(T{}) for the code type that `format` names.
template <class Body>
QK_INLINE void visit_fp8(DType format, Body body) {
  if (format == DType::kFloat8E4M3) {
    body(Float8E4M3{});
  } else {
    body(Float8E5M2{});
  }
}
template <class Body>
QK_INLINE void visit_code(DType format, Body body) {
  if (format == DType::kInt8) {
    body(int8_t{});
  } else {
    visit_fp8(format, body);
  }
}

}  // namespace
}  // namespace qk::QK_ISA
