// Words of panel_gemm.inl on AVX-512 BF16: two bf16 numbers, to the units for dot products of
// pairs.
#pragma once

// GCC 12 takes the undefined registers inside its own intrinsics for a mistake of the caller; see
// simd_avx512.h, which knows one of the two names of this warning.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "cpu/simd_avx512.h"

#define QK_PAIRS

namespace qk::avx512 {
namespace {

struct PairWords {
  using Word = int32_t;
  using Vector = I32;
  static constexpr int kCount = 2;  // k of a word
  static QK_INLINE Vector spread(Word a) { return broadcast(a); }
  static QK_INLINE F32 add(F32 sum, Vector a, Vector b) {
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v)};
  }
  static QK_INLINE Vector load_vector(const Word* p) { return {_mm512_loadu_si512(p)}; }
  static QK_INLINE void store_vector(Word* p, Vector x) { _mm512_storeu_si512(p, x.v); }
};

}  // namespace
}  // namespace qk::avx512
