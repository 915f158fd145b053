// See quantize.h. Each operation exists for a run of elements that share a scale, and for one scale
// per element.
#pragma once

#include "cpu/numeric.inl"
#include "cpu/quantize.h"

namespace qk::QK_ISA {
namespace {

// round(x) + zero_point within [q_min, q_max], in the lowest byte. Clamped before it is rounded:
// the bounds are integers, so the result is the same and the conversion cannot overflow. NaN passes
// through (it is the second operand) and `round` makes its lowest byte 0, the code of zero.
QK_INLINE I32 int_code(F32 x, F32 least, F32 most, I32 zero_point) {
  return round(max(least, min(most, x))) + zero_point;
}

template <class T>
QK_INLINE void span_quantize_int(const T* x, int64_t n, float scale, int zero_point, int q_min,
                                 int q_max, int8_t* q) {
  const F32 inverse = broadcast(1.0f / scale);
  const F32 least = broadcast(static_cast<float>(q_min - zero_point));
  const F32 most = broadcast(static_cast<float>(q_max - zero_point));
  const I32 shift = broadcast(zero_point);
  for_lanes(n, [&](int64_t i, auto lanes) {
    store_bytes(q + i, int_code(load(x + i, lanes) * inverse, least, most, shift), lanes);
  });
}

template <class T>
void row_quantize_int(const T* x, int64_t cols, int64_t group, const float* scale,
                      const int8_t* zero_point, int q_min, int q_max, int8_t* q) {
  if (group == 1) {
    const F32 least = broadcast(static_cast<float>(q_min)),
              most = broadcast(static_cast<float>(q_max));
    for_lanes(cols, [&](int64_t i, auto lanes) {
      const I32 shift = zero_point ? load_signed(zero_point + i, lanes) : broadcast(0);
      const F32 scaled = load(x + i, lanes) * (broadcast(1.0f) / load(scale + i, lanes));
      store_bytes(q + i, int_code(scaled, least - to_float(shift), most - to_float(shift), shift),
                  lanes);
    });
    return;
  }
  for_groups(cols, group, [&](int64_t g, int64_t first, int64_t n) {
    span_quantize_int(x + first, n, scale[g], zero_point ? zero_point[g] : 0, q_min, q_max,
                      q + first);
  });
}

template <class T, class Format>
QK_INLINE void span_quantize_fp8(const T* x, int64_t n, float scale, Format format, uint8_t* q) {
  const F32 inverse = broadcast(1.0f / scale);
  for_lanes(n, [&](int64_t i, auto lanes) {
    store_bytes(q + i, encode<Format, false>(load(x + i, lanes) * inverse, format), lanes);
  });
}

template <class T, class Format>
void row_quantize_fp8(const T* x, int64_t cols, int64_t group, const float* scale, Format format,
                      uint8_t* q) {
  if (group == 1) {
    for_lanes(cols, [&](int64_t i, auto lanes) {
      const F32 scaled = load(x + i, lanes) * (broadcast(1.0f) / load(scale + i, lanes));
      store_bytes(q + i, encode<Format, false>(scaled, format), lanes);
    });
    return;
  }
  for_groups(cols, group, [&](int64_t g, int64_t first, int64_t n) {
    span_quantize_fp8(x + first, n, scale[g], format, q + first);
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
