// 16 fp32 lanes on AVX-512 (F, BW, VL, DQ). The same names exist in simd_avx2.h and
// simd_portable.h; the kernels (*_impl.h) are written once over them and compiled once per ISA,
// each in its namespace.
//
//   F32, I32, Mask  16 lanes
//   Two             32 elements, in an order that load_two chooses and store_two_bytes takes back
//   Full, Part      how many lanes a load or store touches
//   Keys<T>         the bits of T as signed integers in the order of |x| (`abs`) or of x (`order`).
//                   NaN lies beyond infinity, so that an integer min or max propagates it at no
//                   cost, in any order of lanes.
//   F64             16 fp64 sums
#pragma once

// GCC 12 takes the undefined registers inside its own intrinsics for a mistake of the caller.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <cstdint>
#include <cstring>

#include "cpu/types.h"

#define QK_ISA avx512
#define QK_INLINE inline __attribute__((always_inline))

namespace qk::avx512 {

constexpr int kLanes = 16;

struct F32 {
  __m512 v;
};
struct I32 {
  __m512i v;
};
using Mask = __mmask16;
struct Two {
  F32 a, b;
};

struct Full {};
struct Part {
  explicit Part(int64_t n) : count(static_cast<int>(n)), mask(static_cast<Mask>((1u << n) - 1)) {}
  int count;
  Mask mask;
};

QK_INLINE F32 broadcast(float x) { return {_mm512_set1_ps(x)}; }
QK_INLINE I32 broadcast(int x) { return {_mm512_set1_epi32(x)}; }

QK_INLINE F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
QK_INLINE F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
QK_INLINE F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
QK_INLINE F32 operator/(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
// a * b + c, rounded once where the ISA does that: not for results that every ISA must share.
QK_INLINE F32 multiply_add(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// min and max give the second operand if either is NaN: keep the data there and NaN passes through.
QK_INLINE F32 min(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }
QK_INLINE F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }

QK_INLINE I32 operator+(I32 a, I32 b) { return {_mm512_add_epi32(a.v, b.v)}; }
QK_INLINE I32 operator-(I32 a, I32 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
QK_INLINE I32 operator&(I32 a, I32 b) { return {_mm512_and_si512(a.v, b.v)}; }
QK_INLINE I32 operator|(I32 a, I32 b) { return {_mm512_or_si512(a.v, b.v)}; }
QK_INLINE I32 min(I32 a, I32 b) { return {_mm512_min_epi32(a.v, b.v)}; }
QK_INLINE I32 max(I32 a, I32 b) { return {_mm512_max_epi32(a.v, b.v)}; }
template <int kBits>
QK_INLINE I32 shift_left(I32 a) {
  return {_mm512_slli_epi32(a.v, kBits)};
}
template <int kBits>
QK_INLINE I32 shift_right(I32 a) {
  return {_mm512_srli_epi32(a.v, kBits)};
}

QK_INLINE I32 bits(F32 a) { return {_mm512_castps_si512(a.v)}; }
QK_INLINE F32 from_bits(I32 a) { return {_mm512_castsi512_ps(a.v)}; }
// To the nearest integer, ties to even. |a| must be below 2^22, or NaN, whose lowest byte becomes
// 0.
QK_INLINE I32 round(F32 a) { return {_mm512_cvtps_epi32(a.v)}; }
// Toward zero, for |a| below 2^31.
QK_INLINE I32 truncate(F32 a) { return {_mm512_cvttps_epi32(a.v)}; }
QK_INLINE F32 to_float(I32 a) { return {_mm512_cvtepi32_ps(a.v)}; }
QK_INLINE Mask is_nan(F32 a) { return _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q); }
QK_INLINE Mask equal(I32 a, I32 b) { return _mm512_cmpeq_epi32_mask(a.v, b.v); }
QK_INLINE I32 select(Mask m, I32 yes, I32 no) { return {_mm512_mask_mov_epi32(no.v, m, yes.v)}; }

// ---- loads and stores ----
QK_INLINE F32 widen(__m256i x, BFloat16) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))};
}
QK_INLINE F32 widen(__m256i x, Half) { return {_mm512_cvtph_ps(x)}; }
QK_INLINE __m256i narrow(F32 x, Half) {
  return _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// Not vcvtneps2bf16, which flushes subnormals.
QK_INLINE __m256i narrow(F32 x, BFloat16) {
  const I32 b = bits(x);
  const I32 rounded = shift_right<16>(b + (shift_right<16>(b) & broadcast(1)) + broadcast(0x7fff));
  return _mm512_cvtepi32_epi16(select(is_nan(x), broadcast(0x7fc0), rounded).v);
}

QK_INLINE F32 load(const float* p, Full) { return {_mm512_loadu_ps(p)}; }
QK_INLINE F32 load(const float* p, Part n) { return {_mm512_maskz_loadu_ps(n.mask, p)}; }
template <class T>
QK_INLINE F32 load(const T* p, Full) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{});
}
template <class T>
QK_INLINE F32 load(const T* p, Part n) {
  return widen(_mm256_maskz_loadu_epi16(n.mask, p), T{});
}
QK_INLINE void store(float* p, F32 x, Full) { _mm512_storeu_ps(p, x.v); }
QK_INLINE void store(float* p, F32 x, Part n) { _mm512_mask_storeu_ps(p, n.mask, x.v); }
template <class T>
QK_INLINE void store(T* p, F32 x, Full) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x, T{}));
}
template <class T>
QK_INLINE void store(T* p, F32 x, Part n) {
  _mm256_mask_storeu_epi16(p, n.mask, narrow(x, T{}));
}

QK_INLINE I32 load_signed(const void* p, Full) {
  return {_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)))};
}
QK_INLINE I32 load_signed(const void* p, Part n) {
  return {_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(n.mask, p))};
}
// The lowest byte of each lane.
QK_INLINE void store_bytes(void* p, I32 x, Full) {
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x.v));
}
QK_INLINE void store_bytes(void* p, I32 x, Part n) {
  _mm512_mask_cvtepi32_storeu_epi8(p, n.mask, x.v);
}

// 32 bf16 numbers as the even and the odd ones, which takes three instructions instead of six.
QK_INLINE Two load_two(const BFloat16* p) {
  const __m512i x = _mm512_loadu_si512(p);
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(x, 16))},
          {_mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(-65536)))}};
}
QK_INLINE void store_two_bytes(BFloat16, void* p, I32 even, I32 odd) {
  const __m512i low = _mm512_set1_epi32(0xff), high = _mm512_slli_epi32(odd.v, 8);
  const __m512i words = _mm512_ternarylogic_epi32(low, even.v, high, 0xca);  // low ? even : high
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(words));
}

QK_INLINE float to_float(float x) { return x; }
QK_INLINE float to_float(Half x) { return _cvtsh_ss(x.bits); }

// ---- order-preserving integer keys ----
template <class T>
struct Keys {  // Half, BFloat16
  using Scalar = int16_t;
  using Vec = __m512i;
  static constexpr int kCount = 32;
  static QK_INLINE Vec load(const void* p) { return _mm512_loadu_si512(p); }
  static QK_INLINE void store(Scalar* p, Vec x) { _mm512_storeu_si512(p, x); }
  static QK_INLINE Vec broadcast(Scalar x) { return _mm512_set1_epi16(x); }
  static QK_INLINE Vec abs(Vec x) { return _mm512_and_si512(x, _mm512_set1_epi16(0x7fff)); }
  static QK_INLINE Vec order(Vec x) {
    return _mm512_ternarylogic_epi32(x, _mm512_srai_epi16(x, 15), _mm512_set1_epi16(0x7fff),
                                     0x78);  // x ^ (s & m)
  }
  static QK_INLINE Vec min(Vec a, Vec b) { return _mm512_min_epi16(a, b); }
  static QK_INLINE Vec max(Vec a, Vec b) { return _mm512_max_epi16(a, b); }
  // phminposuw finds the least of eight unsigned words; x ^ flip turns either wanted extreme into
  // that.
  static QK_INLINE int reduce(__m128i x, int16_t flip) {
    const __m128i f = _mm_set1_epi16(flip);
    return static_cast<Scalar>(_mm_extract_epi16(_mm_minpos_epu16(_mm_xor_si128(x, f)), 0) ^ flip);
  }
  static QK_INLINE int reduce_max(Vec x) {
    const __m256i y = _mm256_max_epi16(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
    return reduce(_mm_max_epi16(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1)), 0x7fff);
  }
  static QK_INLINE int reduce_min(Vec x) {
    const __m256i y = _mm256_min_epi16(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
    return reduce(_mm_min_epi16(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1)),
                  static_cast<int16_t>(0x8000));
  }
};

template <>
struct Keys<float> {
  using Scalar = int32_t;
  using Vec = __m512i;
  static constexpr int kCount = 16;
  static QK_INLINE Vec load(const void* p) { return _mm512_loadu_si512(p); }
  static QK_INLINE void store(Scalar* p, Vec x) { _mm512_storeu_si512(p, x); }
  static QK_INLINE Vec broadcast(Scalar x) { return _mm512_set1_epi32(x); }
  static QK_INLINE Vec abs(Vec x) { return _mm512_and_si512(x, _mm512_set1_epi32(0x7fffffff)); }
  static QK_INLINE Vec order(Vec x) {
    return _mm512_ternarylogic_epi32(x, _mm512_srai_epi32(x, 31), _mm512_set1_epi32(0x7fffffff),
                                     0x78);
  }
  static QK_INLINE Vec min(Vec a, Vec b) { return _mm512_min_epi32(a, b); }
  static QK_INLINE Vec max(Vec a, Vec b) { return _mm512_max_epi32(a, b); }
  static QK_INLINE int reduce_max(Vec x) { return _mm512_reduce_max_epi32(x); }
  static QK_INLINE int reduce_min(Vec x) { return _mm512_reduce_min_epi32(x); }
};

// Lanes from n on repeat the first one, which changes no extreme.
QK_INLINE __m512i load_keys(const float* p, int64_t n) {
  return _mm512_mask_loadu_epi32(_mm512_castps_si512(_mm512_set1_ps(*p)), Part(n).mask, p);
}
template <class T>
QK_INLINE __m512i load_keys(const T* p, int64_t n) {
  return _mm512_mask_loadu_epi16(_mm512_set1_epi16(static_cast<int16_t>(p->bits)), (1u << n) - 1,
                                 p);
}

// The lanes that a load of n lanes fills; the others become zero.
QK_INLINE F32 keep(F32 x, Full) { return x; }
QK_INLINE F32 keep(F32 x, Part n) { return {_mm512_maskz_mov_ps(n.mask, x.v)}; }

// ---- fp64 sums ----
struct F64 {
  __m512d low, high;
};
QK_INLINE F64 zero_sums() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
// acc + x * x; the square of an fp32 number is exact in fp64, so fused or not gives the same sum.
QK_INLINE F64 add_square(F64 acc, F32 x) {
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x.v));
  const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1));
  return {_mm512_fmadd_pd(low, low, acc.low), _mm512_fmadd_pd(high, high, acc.high)};
}
QK_INLINE void store(double* p, F64 x) {
  _mm512_storeu_pd(p, x.low);
  _mm512_storeu_pd(p + 8, x.high);
}

// ---- nibbles: 64 codes <-> 32 bytes, code 2i in the low half of byte i; (c + 8) & 15 is (c ^ 8) &
// 15 ----
constexpr int kNibbleCodes = 64;
QK_INLINE void pack_nibbles(const int8_t* codes, uint8_t* out) {
  const __m512i c = _mm512_loadu_si512(codes);
  const __m512i u = _mm512_ternarylogic_epi32(c, _mm512_set1_epi8(8), _mm512_set1_epi8(15),
                                              0x28);                         // (c ^ 8) & 15
  const __m512i pairs = _mm512_maddubs_epi16(u, _mm512_set1_epi16(0x1001));  // low + 16 * high
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi16_epi8(pairs));
}
QK_INLINE void unpack_nibbles(const uint8_t* in, int8_t* codes) {
  const __m512i x = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in)));
  const __m512i u =
      _mm512_and_si512(_mm512_or_si512(x, _mm512_slli_epi16(x, 4)), _mm512_set1_epi8(15));
  _mm512_storeu_si512(codes, _mm512_sub_epi8(u, _mm512_set1_epi8(8)));
}

}  // namespace qk::avx512
