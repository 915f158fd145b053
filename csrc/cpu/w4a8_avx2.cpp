// The kernels of w4a8.h for AVX2. vpmaddubsw does not saturate here: 2 * 15 * 127 is far below
// 2^15.
#include "cpu/simd_avx2.h"

namespace qk::avx2 {
namespace {

// 8 sums, 2 vectors of weights and one of codes in 16 registers.
constexpr int kTileRows = 4;
constexpr bool kOwnStream = false;

struct Narrow {
  __m256i a, b;
};
struct Nibbles {
  __m256i a, b;
};
struct FourCodes {
  __m256i v;
};
QK_INLINE Narrow zero_narrow() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
template <bool kHigh>
QK_INLINE Nibbles load_nibbles(const uint32_t* p) {
  const __m256i low = _mm256_set1_epi8(15);
  __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + 1);
  if constexpr (kHigh) {
    a = _mm256_srli_epi16(a, 4);
    b = _mm256_srli_epi16(b, 4);
  }
  return {_mm256_and_si256(a, low), _mm256_and_si256(b, low)};
}
QK_INLINE FourCodes load_codes(const int8_t* p) {
  int32_t four;
  std::memcpy(&four, p, sizeof(four));
  return {_mm256_set1_epi32(four)};
}
QK_INLINE Narrow add_products(Narrow sum, Nibbles weights, FourCodes codes) {
  return {_mm256_add_epi16(sum.a, _mm256_maddubs_epi16(weights.a, codes.v)),
          _mm256_add_epi16(sum.b, _mm256_maddubs_epi16(weights.b, codes.v))};
}
QK_INLINE I32 widen(Narrow x) {
  const __m256i ones = _mm256_set1_epi16(1);
  return {_mm256_madd_epi16(x.a, ones), _mm256_madd_epi16(x.b, ones)};
}
QK_INLINE I32 multiply_low(I32 x, I32 y) {
  return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)};
}

}  // namespace
}  // namespace qk::avx2

#include "cpu/w4a8.inl"
#include "cpu/w4a8_narrow.inl"
