// The kernels of gptq.h for AVX-512; pairs go to the units for dot products of bf16.
#include "cpu/simd_avx512.h"
#include "cpu/transpose_avx512.h"

namespace qk::avx512 {
namespace {
// 24 sums, 3 vectors of words and a share, in 32 registers.
constexpr int kVectors = 3, kColumns = 8;

struct PairWords {
  static QK_INLINE F32 add(F32 sum, F32 a, F32 b) {
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v)};
  }
};
}  // namespace
}  // namespace qk::avx512

#define QK_PAIRS
#include "cpu/gptq.inl"
