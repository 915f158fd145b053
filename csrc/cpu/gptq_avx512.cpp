// The kernels of gptq.h for AVX-512; pairs go to the units for dot products of bf16.
#include "cpu/simd_avx512.h"
#include "cpu/transpose_avx512.h"

namespace qk::avx512 {
namespace {
// 24 sums, 3 vectors of words and a share, in 32 registers.
constexpr int kVectors = 3, kColumns = 8;

struct PairWords {
  static constexpr int kNumbers = 2;
  // Quicker than pair_of, though it flushes subnormals.
  static QK_INLINE F32 word(F32 even, F32 odd) {
    alignas(64) static constexpr int16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                       21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                       11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd.v, even.v);
    return {(__m512)_mm512_permutexvar_epi16(_mm512_load_si512(kOrder), both)};
  }
  static QK_INLINE F32 add(F32 sum, F32 a, F32 b) {
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v)};
  }
};
}  // namespace
}  // namespace qk::avx512

#define QK_PAIRS
#include "cpu/gptq.inl"
