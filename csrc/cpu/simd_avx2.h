// 16 fp32 lanes on AVX2 with FMA and F16C, as two registers of eight. What the names mean:
// simd_avx512.h.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "cpu/types.h"

#define QK_ISA avx2
#define QK_INLINE inline __attribute__((always_inline))

namespace qk::avx2 {

constexpr int kLanes = 16;

struct F32 {
  __m256 a, b;
};
struct I32 {
  __m256i a, b;
};
using Mask = I32;
struct Two {
  F32 a, b;
};

struct Full {};
struct Part {
  explicit Part(int64_t n) : count(static_cast<int>(n)) {}
  int count;
};

QK_INLINE F32 broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
QK_INLINE I32 broadcast(int x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }

QK_INLINE F32 operator+(F32 x, F32 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
QK_INLINE F32 operator-(F32 x, F32 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
QK_INLINE F32 operator*(F32 x, F32 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
QK_INLINE F32 operator/(F32 x, F32 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
QK_INLINE F32 multiply_add(F32 x, F32 y, F32 z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
QK_INLINE F32 min(F32 x, F32 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
QK_INLINE F32 max(F32 x, F32 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }

QK_INLINE I32 operator+(I32 x, I32 y) {
  return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)};
}
QK_INLINE I32 operator-(I32 x, I32 y) {
  return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)};
}
QK_INLINE I32 operator&(I32 x, I32 y) {
  return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)};
}
QK_INLINE I32 operator|(I32 x, I32 y) {
  return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)};
}
QK_INLINE I32 min(I32 x, I32 y) { return {_mm256_min_epi32(x.a, y.a), _mm256_min_epi32(x.b, y.b)}; }
QK_INLINE I32 max(I32 x, I32 y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
template <int kBits>
QK_INLINE I32 shift_left(I32 x) {
  return {_mm256_slli_epi32(x.a, kBits), _mm256_slli_epi32(x.b, kBits)};
}
template <int kBits>
QK_INLINE I32 shift_right(I32 x) {
  return {_mm256_srli_epi32(x.a, kBits), _mm256_srli_epi32(x.b, kBits)};
}

QK_INLINE I32 bits(F32 x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
QK_INLINE F32 from_bits(I32 x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
QK_INLINE I32 round(F32 x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
QK_INLINE I32 truncate(F32 x) { return {_mm256_cvttps_epi32(x.a), _mm256_cvttps_epi32(x.b)}; }
QK_INLINE F32 to_float(I32 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
QK_INLINE Mask is_nan(F32 x) {
  return bits({_mm256_cmp_ps(x.a, x.a, _CMP_UNORD_Q), _mm256_cmp_ps(x.b, x.b, _CMP_UNORD_Q)});
}
QK_INLINE Mask equal(I32 x, I32 y) {
  return {_mm256_cmpeq_epi32(x.a, y.a), _mm256_cmpeq_epi32(x.b, y.b)};
}
QK_INLINE I32 select(Mask m, I32 yes, I32 no) {
  return {_mm256_blendv_epi8(no.a, yes.a, m.a), _mm256_blendv_epi8(no.b, yes.b, m.b)};
}

// ---- loads and stores ----
QK_INLINE const __m128i* halves(const void* p) { return static_cast<const __m128i*>(p); }

QK_INLINE F32 load(const float* p, Full) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
QK_INLINE F32 load(const Half* p, Full) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(halves(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(halves(p) + 1))};
}
QK_INLINE F32 load(const BFloat16* p, Full) {
  return from_bits(shift_left<16>({_mm256_cvtepu16_epi32(_mm_loadu_si128(halves(p))),
                                   _mm256_cvtepu16_epi32(_mm_loadu_si128(halves(p) + 1))}));
}
QK_INLINE void store(float* p, F32 x, Full) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
QK_INLINE void store(Half* p, F32 x, Full) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.a, kMode));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p) + 1, _mm256_cvtps_ph(x.b, kMode));
}
QK_INLINE void store(BFloat16* p, F32 x, Full) {
  const I32 b = bits(x);
  const I32 odd = shift_right<16>(b) & broadcast(1);
  const I32 rounded = shift_right<16>(b + odd + broadcast(0x7fff));
  const I32 y = select(is_nan(x), broadcast(0x7fc0), rounded);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(y.a, y.b), 0xd8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), packed);
}

QK_INLINE I32 load_signed(const void* p, Full) {
  const __m128i x = _mm_loadu_si128(static_cast<const __m128i*>(p));
  return {_mm256_cvtepi8_epi32(x), _mm256_cvtepi8_epi32(_mm_srli_si128(x, 8))};
}
QK_INLINE void store_bytes(void* p, I32 x, Full) {
  // The packs saturate, so the upper bytes go first; they also interleave the 128-bit halves.
  const I32 low = x & broadcast(0xff);
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(low.a, low.b), 0xd8);
  const __m128i bytes =
      _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(static_cast<__m128i*>(p), bytes);
}

QK_INLINE float to_float(float x) { return x; }
QK_INLINE float to_float(Half x) { return _cvtsh_ss(x.bits); }

// ---- order-preserving integer keys ----
template <class T>
struct Keys {  // Half, BFloat16
  using Scalar = int16_t;
  using Vec = __m256i;
  static constexpr int kCount = 16;
  static QK_INLINE Vec load(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  }
  static QK_INLINE void store(Scalar* p, Vec x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x);
  }
  static QK_INLINE Vec broadcast(Scalar x) { return _mm256_set1_epi16(x); }
  static QK_INLINE Vec abs(Vec x) { return _mm256_and_si256(x, _mm256_set1_epi16(0x7fff)); }
  static QK_INLINE Vec order(Vec x) {
    const Vec sign = _mm256_srai_epi16(x, 15);
    return _mm256_xor_si256(x, _mm256_and_si256(sign, _mm256_set1_epi16(0x7fff)));
  }
  static QK_INLINE Vec min(Vec x, Vec y) { return _mm256_min_epi16(x, y); }
  static QK_INLINE Vec max(Vec x, Vec y) { return _mm256_max_epi16(x, y); }
  // phminposuw finds the least of eight unsigned words; x ^ flip turns either extreme into that.
  static QK_INLINE int reduce(__m128i x, int16_t flip) {
    const __m128i least = _mm_minpos_epu16(_mm_xor_si128(x, _mm_set1_epi16(flip)));
    return static_cast<Scalar>(_mm_extract_epi16(least, 0) ^ flip);
  }
  static QK_INLINE int reduce_max(Vec x) {
    const __m128i low = _mm256_castsi256_si128(x), high = _mm256_extracti128_si256(x, 1);
    return reduce(_mm_max_epi16(low, high), 0x7fff);
  }
  static QK_INLINE int reduce_min(Vec x) {
    const __m128i low = _mm256_castsi256_si128(x), high = _mm256_extracti128_si256(x, 1);
    return reduce(_mm_min_epi16(low, high), static_cast<int16_t>(0x8000));
  }
};

template <>
struct Keys<float> {
  using Scalar = int32_t;
  using Vec = __m256i;
  static constexpr int kCount = 8;
  static QK_INLINE Vec load(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  }
  static QK_INLINE void store(Scalar* p, Vec x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x);
  }
  static QK_INLINE Vec broadcast(Scalar x) { return _mm256_set1_epi32(x); }
  static QK_INLINE Vec abs(Vec x) { return _mm256_and_si256(x, _mm256_set1_epi32(0x7fffffff)); }
  static QK_INLINE Vec order(Vec x) {
    const Vec sign = _mm256_srai_epi32(x, 31);
    return _mm256_xor_si256(x, _mm256_and_si256(sign, _mm256_set1_epi32(0x7fffffff)));
  }
  static QK_INLINE Vec min(Vec x, Vec y) { return _mm256_min_epi32(x, y); }
  static QK_INLINE Vec max(Vec x, Vec y) { return _mm256_max_epi32(x, y); }
  static QK_INLINE int reduce_max(Vec x) {
    __m128i y = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    y = _mm_max_epi32(y, _mm_shuffle_epi32(y, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(y, _mm_shuffle_epi32(y, 0xb1)));
  }
  static QK_INLINE int reduce_min(Vec x) {
    __m128i y = _mm_min_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    y = _mm_min_epi32(y, _mm_shuffle_epi32(y, 0x4e));
    return _mm_cvtsi128_si32(_mm_min_epi32(y, _mm_shuffle_epi32(y, 0xb1)));
  }
};

// ---- fp64 sums ----
struct F64 {
  __m256d v[4];
};
QK_INLINE F64 zero_sums() {
  const __m256d zero = _mm256_setzero_pd();
  return {{zero, zero, zero, zero}};
}
QK_INLINE F64 add_square(F64 acc, F32 x) {
  const __m256d wide[4] = {
      _mm256_cvtps_pd(_mm256_castps256_ps128(x.a)), _mm256_cvtps_pd(_mm256_extractf128_ps(x.a, 1)),
      _mm256_cvtps_pd(_mm256_castps256_ps128(x.b)), _mm256_cvtps_pd(_mm256_extractf128_ps(x.b, 1))};
  for (int i = 0; i < 4; ++i) acc.v[i] = _mm256_fmadd_pd(wide[i], wide[i], acc.v[i]);
  return acc;
}
QK_INLINE void store(double* p, F64 x) {
  for (int i = 0; i < 4; ++i) _mm256_storeu_pd(p + 4 * i, x.v[i]);
}

// ---- nibbles: see simd_avx512.h ----
constexpr int kNibbleCodes = 32;
QK_INLINE void pack_nibbles(const int8_t* codes, uint8_t* out) {
  const __m256i c = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
  const __m256i u =
      _mm256_and_si256(_mm256_xor_si256(c, _mm256_set1_epi8(8)), _mm256_set1_epi8(15));
  const __m256i pairs = _mm256_maddubs_epi16(u, _mm256_set1_epi16(0x1001));
  const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(pairs, pairs), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(bytes));
}
QK_INLINE void unpack_nibbles(const uint8_t* in, int8_t* codes) {
  const __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in)));
  const __m256i u =
      _mm256_and_si256(_mm256_or_si256(x, _mm256_slli_epi16(x, 4)), _mm256_set1_epi8(15));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), _mm256_sub_epi8(u, _mm256_set1_epi8(8)));
}

#include "cpu/simd_partial.inl"

}  // namespace qk::avx2
