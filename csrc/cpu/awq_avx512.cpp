// The kernels of awq.h for AVX-512; large weights go to the units for dot products of bf16 pairs.
#include "cpu/simd_avx512.h"

namespace qk::avx512 {
namespace {

// 24 sums and 3 vectors in 32 registers.
constexpr int kRows = 8, kVectors = 3;

// A word is a column's numbers in two rows.
struct PairWords {
  using Word = int32_t;
  using Element = BFloat16;
  static constexpr int kNumbers = 2;
  static QK_INLINE F32 add(F32 sum, const Element* a, I32 b) {
    int32_t pair;
    std::memcpy(&pair, a, sizeof(pair));
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)b.v)};
  }
  static QK_INLINE I32 load_vector(const Word* p) { return {_mm512_loadu_si512(p)}; }
  static QK_INLINE void store_vector(Word* p, const F32* rows) {
    const __m512i even = _mm512_cvtepu16_epi32(narrow(rows[0], BFloat16{}));
    const __m512i odd = _mm512_cvtepu16_epi32(narrow(rows[1], BFloat16{}));
    _mm512_storeu_si512(p, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
  }
  // The units flush subnormals anyway.
  static QK_INLINE void store_errors(Element* p, F32 x, Full) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x.v));
  }
  static QK_INLINE void store_errors(Element* p, F32 x, Part n) {
    _mm256_mask_storeu_epi16(p, n.mask, (__m256i)_mm512_cvtneps_pbh(x.v));
  }
};

}  // namespace
}  // namespace qk::avx512

#define QK_PAIRS
#include "cpu/awq.inl"
