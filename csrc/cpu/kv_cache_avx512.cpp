// The kernels of kv_cache.h for AVX-512: e4m3 by way of fp16, sums of lanes by a tree.
#include "cpu/exp2_avx512.h"
#include "cpu/simd_avx512.h"

#include "cpu/numeric.inl"

#define QK_CODES

namespace qk::avx512 {
namespace {

template <class Format>
struct FastCodes;

template <>
struct FastCodes<int8_t> {
  static constexpr float kUnit = 1.0f;
  static QK_INLINE F32 load_codes(const uint8_t* p) { return to_float(load_signed(p, Full{})); }
};

// An e4m3 code has the bits of an fp16 number 2^-8 times as large, subnormals too; all but NaN.
template <>
struct FastCodes<Float8E4M3> {
  static constexpr float kUnit = 256.0f;
  static QK_INLINE F32 load_codes(const uint8_t* p) {
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(codes), 7);
    return {_mm512_cvtph_ps(_mm256_and_si256(wide, _mm256_set1_epi16(static_cast<short>(0xbfff))))};
  }
};
constexpr bool kFastLosesNan = true;

// NaN has the largest magnitude.
QK_INLINE bool any_nan(const uint8_t* p, int64_t n) {
  const __m512i magnitude = _mm512_set1_epi8(0x7f);
  __m512i most = _mm512_setzero_si512();
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    most = _mm512_max_epu8(most, _mm512_and_si512(_mm512_loadu_si512(p + i), magnitude));
  }
  if (i < n) {
    const __m512i left = _mm512_maskz_loadu_epi8((__mmask64{1} << (n - i)) - 1, p + i);
    most = _mm512_max_epu8(most, _mm512_and_si512(left, magnitude));
  }
  return _mm512_cmpeq_epi8_mask(most, magnitude) != 0;
}

// The sums of the lanes of 16 vectors. First of four vectors each within groups of four lanes...
QK_INLINE __m512 sum_four(const F32* x) {
  const __m512 a = _mm512_add_ps(_mm512_maskz_unpacklo_ps(0xffff, x[0].v, x[1].v),
                                 _mm512_maskz_unpackhi_ps(0xffff, x[0].v, x[1].v));
  const __m512 b = _mm512_add_ps(_mm512_maskz_unpacklo_ps(0xffff, x[2].v, x[3].v),
                                 _mm512_maskz_unpackhi_ps(0xffff, x[2].v, x[3].v));
  const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_maskz_unpacklo_pd(0xff, c, d)),
                       _mm512_castpd_ps(_mm512_maskz_unpackhi_pd(0xff, c, d)));
}
// ... then of the groups.
QK_INLINE F32 sums_of_lanes(const F32* x) {
  const __m512 a = sum_four(x), b = sum_four(x + 4), c = sum_four(x + 8), d = sum_four(x + 12);
  const __m512 low = _mm512_add_ps(_mm512_maskz_shuffle_f32x4(0xffff, a, b, 0x88),
                                   _mm512_maskz_shuffle_f32x4(0xffff, a, b, 0xdd));
  const __m512 high = _mm512_add_ps(_mm512_maskz_shuffle_f32x4(0xffff, c, d, 0x88),
                                    _mm512_maskz_shuffle_f32x4(0xffff, c, d, 0xdd));
  return {_mm512_add_ps(_mm512_maskz_shuffle_f32x4(0xffff, low, high, 0x88),
                        _mm512_maskz_shuffle_f32x4(0xffff, low, high, 0xdd))};
}

}  // namespace
}  // namespace qk::avx512

#include "cpu/kv_cache.inl"
