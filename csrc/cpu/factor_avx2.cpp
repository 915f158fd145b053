// The kernels of factor.h for AVX2.
#include "cpu/simd_avx2.h"

namespace qk::avx2 {
namespace {
// 4 sums of two registers each in 16 registers.
constexpr int kRows = 4, kVectors = 1;
}  // namespace
}  // namespace qk::avx2

#include "cpu/factor.inl"
