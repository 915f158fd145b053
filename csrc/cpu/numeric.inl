// What the kernels of every family share, over the SIMD header of the including translation unit.

#pragma once

namespace qk::QK_ISA {

// f(first, lanes) for every 16 elements of n, the last time for what is left.
template <class Body>
QK_INLINE void for_lanes(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, Full{});
  if (i < n) body(i, Part(n - i));
}

// Brings p[i] into the cache, to be read soon; a null p is nothing.
template <class T>
QK_INLINE void prefetch(const T* p, int64_t i) {
  if (p) __builtin_prefetch(p + i, 0, 2);
}

// Where the ISA's header has nothing better, Two is sixteen elements and the sixteen after them.
template <class T>
QK_INLINE Two load_two(const T* p) {
  return {load(p, Full{}), load(p + kLanes, Full{})};
}
template <class T>
QK_INLINE void store_two_bytes(T, void* p, I32 a, I32 b) {
  store_bytes(p, a, Full{});
  store_bytes(static_cast<uint8_t*>(p) + kLanes, b, Full{});
}

// q[i] = the lowest byte of f(x[i]) for n elements that are all treated alike. `ahead` is what will
// be read next, element by element as x: it is fetched meanwhile. Null for nothing.
template <class T, class Body>
QK_INLINE void map_bytes(const T* x, const T* ahead, int64_t n, void* q, Body f) {
  uint8_t* out = static_cast<uint8_t*>(q);
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    for (int64_t line = 0; line < 2 * kLanes; line += 64 / sizeof(T)) prefetch(ahead, i + line);
    const Two two = load_two(x + i);
    store_two_bytes(T{}, out + i, f(two.a), f(two.b));
  }
  for_lanes(n - i, [&](int64_t j, auto lanes) {
    store_bytes(out + i + j, f(load(x + i + j, lanes)), lanes);
  });
}

// f(group index, first column, columns) for every group of a row; the last one may be shorter.
template <class Body>
QK_INLINE void for_groups(int64_t cols, int64_t group, Body body) {
  for (int64_t g = 0, first = 0; first < cols; ++g, first += group) {
    body(g, first, group < cols - first ? group : cols - first);
  }
}

// f(T{}) for the float type that `dtype` names; the boundary has checked that it is one.
template <class Body>
QK_INLINE void visit_float(DType dtype, Body body) {
  if (dtype == DType::kFloat32) {
    body(float{});
  } else if (dtype == DType::kFloat16) {
    body(Half{});
  } else {
    body(BFloat16{});
  }
}

QK_INLINE float to_float(BFloat16 x) {
  const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
  float result;
  std::memcpy(&result, &wide, sizeof(result));
  return result;
}

// x rounded to T, as fp32.
template <class T>
QK_INLINE F32 round_to(F32 x, T) {
  T rounded[kLanes];
  store(rounded, x, Full{});
  return load(rounded, Full{});
}
QK_INLINE F32 round_to(F32 x, float) { return x; }

QK_INLINE F32 magnitude(F32 x) { return from_bits(bits(x) & broadcast(0x7fffffff)); }

// FP8 of x in the lowest byte of each lane: saturating, to nearest even, NaN kept with its sign.
// `kInRange` promises that x is no NaN and within half a step of the format's range.
//
// With e the exponent of x (at least that of the subnormals), 2^e * 2^(23 - mantissa bits) has the
// same unit in the last place as the result: adding it makes the hardware round, and leaves the
// rounded mantissa, with its leading one, in the lowest bits of the sum. A carry to the next power
// of two, and subnormals, need no care.
template <class Format, bool kInRange>
QK_INLINE I32 encode(F32 x, Format) {
  constexpr int kShift = 23 - Format::kMantissa;
  constexpr int kLeast = (127 + Format::kMinExponent) << 23;
  F32 size = magnitude(x);
  if constexpr (!kInRange) size = min(broadcast(Format::kMax), size);
  const I32 exponent = max(bits(size) & broadcast(0x7f800000), broadcast(kLeast));
  const I32 sum = bits(size + from_bits(exponent + broadcast(kShift << 23)));
  I32 code = sum + shift_right<kShift>(exponent - broadcast(kLeast));
  if constexpr (!kInRange) code = select(is_nan(x), broadcast(Format::kNan), code);
  return code | (shift_right<24>(bits(x)) & broadcast(0x80));
}

// fp32 of the codes in the lowest bytes.
template <class Format>
QK_INLINE F32 decode(I32 code, Format) {
  constexpr int kShift = 23 - Format::kMantissa;
  constexpr int kLeast = (127 + Format::kMinExponent) << 23;
  const I32 size = code & broadcast(0x7f);
  const I32 mantissa = shift_left<kShift>(size);
  const I32 exponent = mantissa & broadcast(0x7f << kShift & 0x7f800000);
  // Subnormals share the least exponent but have no leading one: added with it, taken off as a
  // number.
  const F32 least = from_bits(broadcast(kLeast));
  const I32 subnormal = bits(from_bits(mantissa + broadcast(kLeast)) - least);
  I32 result =
      select(equal(exponent, broadcast(0)), subnormal, mantissa + broadcast(kLeast - (1 << 23)));
  if constexpr (Format::kMantissa == 2) {  // e5m2: the largest exponent means infinity or NaN
    const Mask special = equal(exponent, broadcast(0x7f << kShift & 0x7f800000));
    result = select(special, mantissa | broadcast(0x7f800000), result);
  } else {
    result = select(equal(size, broadcast(Format::kNan)), broadcast(0x7fc00000), result);
  }
  return from_bits(result | shift_left<24>(code & broadcast(0x80)));
}
QK_INLINE F32 decode(I32 code, int8_t) { return to_float(code); }

}  // namespace qk::QK_ISA
