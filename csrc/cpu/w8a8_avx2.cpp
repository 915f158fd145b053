// The kernels of w8a8.h for AVX2. vpmaddubsw saturates where two products of 255 * 127 meet, so
// codes are widened to 16 bits, the even and the odd ones of a word apart: no shuffles are needed.
#include "cpu/simd_avx2.h"

namespace qk::avx2 {
namespace {

// 8 sums, 4 vectors of weights, 2 of codes and two products in 16 registers.
constexpr int kRows = 4, kVectors = 1;

struct Weights {
  I32 even, odd;
};
struct Codes {
  __m256i even, odd;
};
QK_INLINE Weights load_weights(const int8_t* p) {
  const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + 1);
  return {{_mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8),
           _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8)},
          {_mm256_srai_epi16(a, 8), _mm256_srai_epi16(b, 8)}};
}
QK_INLINE Codes load_codes(const uint8_t* p) {
  int32_t word;
  std::memcpy(&word, p, sizeof(word));
  const __m256i x = _mm256_set1_epi32(word);
  return {_mm256_and_si256(x, _mm256_set1_epi16(0xff)), _mm256_srli_epi16(x, 8)};
}
QK_INLINE I32 dot(I32 sum, Codes a, Weights w) {
  sum.a = _mm256_add_epi32(sum.a, _mm256_madd_epi16(a.even, w.even.a));
  sum.b = _mm256_add_epi32(sum.b, _mm256_madd_epi16(a.even, w.even.b));
  sum.a = _mm256_add_epi32(sum.a, _mm256_madd_epi16(a.odd, w.odd.a));
  sum.b = _mm256_add_epi32(sum.b, _mm256_madd_epi16(a.odd, w.odd.b));
  return sum;
}
QK_INLINE I32 multiply_low(I32 x, I32 y) {
  return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)};
}

}  // namespace
}  // namespace qk::avx2

#include "cpu/w8a8.inl"
