// The kernels of gram.h for AVX-512; bf16 goes to the units for dot products of pairs.
#include "cpu/simd_avx512.h"

namespace qk::avx512 {
namespace {

// 24 sums and 3 vectors in 32 registers.
constexpr int kRows = 8, kVectors = 3;

// A word is a column's numbers of two tokens.
struct PairWords {
  using Word = int32_t;
  static constexpr int kTokens = 2;
  static QK_INLINE F32 add(F32 sum, const Word* a, I32 b) {
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)_mm512_set1_epi32(*a), (__m512bh)b.v)};
  }
  static QK_INLINE I32 load_vector(const Word* p) { return {_mm512_loadu_si512(p)}; }
};

inline void pack_pairs(const BFloat16* x, int64_t stride, int64_t tokens, int64_t first,
                       int64_t cols, int32_t* packed) {
  const __mmask16 mask = Part(cols - first < kLanes ? cols - first : kLanes).mask;
  for (int64_t t = 0; t < tokens; t += 2) {
    const BFloat16* row = x + t * stride + first;
    const __m256i even = _mm256_maskz_loadu_epi16(mask, row);
    const __m256i odd =
        _mm256_maskz_loadu_epi16(t + 1 < tokens ? mask : 0, t + 1 < tokens ? row + stride : row);
    const __m512i pairs = _mm512_or_si512(_mm512_cvtepu16_epi32(even),
                                          _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
    _mm512_storeu_si512(packed + t / 2 * kLanes, pairs);
  }
}

}  // namespace
}  // namespace qk::avx512

#define QK_PAIRS
#include "cpu/gram.inl"
