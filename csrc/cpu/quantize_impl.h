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

// `ahead` is what will be read next, element by element as x: it is fetched meanwhile. Null for
// nothing.
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
  for_groups(cols, group, [&](int64_t g, int64_t first, int64_t n) {
    const F32 inverse = broadcast(1.0f / scale[g]);
    const int shift = zero_point ? zero_point[g] : 0;
    const I32 zero = broadcast(shift);
    if (shift < q_min || shift > q_max) {
      for_lanes(n, [&](int64_t i, auto lanes) {
        const F32 scaled = load(x + first + i, lanes) * inverse;
        store_bytes(q + first + i, int_code_each(scaled, zero, q_min, q_max), lanes);
      });
      return;
    }
    const F32 least = broadcast(static_cast<float>(q_min - shift));
    const F32 most = broadcast(static_cast<float>(q_max - shift));
    for_lanes(n, [&](int64_t i, auto lanes) {
      prefetch(ahead, first + i);
      const F32 scaled = load(x + first + i, lanes) * inverse;
      store_bytes(q + first + i, int_code(scaled, least, most, zero), lanes);
    });
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
    if (kFitted && scale[g] - scale[g] == 0.0f) {
      for_lanes(n, [&](int64_t i, auto lanes) {
        prefetch(ahead, first + i);
        store_bytes(q + first + i,
                    encode<Format, true>(load(x + first + i, lanes) * inverse, format), lanes);
      });
    } else {
      for_lanes(n, [&](int64_t i, auto lanes) {
        store_bytes(q + first + i,
                    encode<Format, false>(load(x + first + i, lanes) * inverse, format), lanes);
      });
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
