// The kernels of gram.h for AVX-512; bf16 goes to the units for dot products of pairs.
#include "cpu/simd_avx512.h"
#include "cpu/transpose_avx512.h"

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
  static QK_INLINE void store_words(Word* p, const F32* tokens) {
    const I32 pairs = shift_right<16>(bits(tokens[0])) | bits(tokens[1]);
    _mm512_storeu_si512(p, pairs.v);
  }
};

}  // namespace
}  // namespace qk::avx512

#define QK_PAIRS
#include "cpu/gram.inl"
