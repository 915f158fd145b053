// The kernels of factor.h for AVX-512.
#include "cpu/simd_avx512.h"
#include "cpu/transpose_avx512.h"

namespace qk::avx512 {
namespace {
// 24 sums, 3 vectors and a factor, in 32 registers.
constexpr int kRows = 8, kVectors = 3;
}  // namespace
}  // namespace qk::avx512

#include "cpu/factor.inl"
