// The kernels of awq.h for AVX2.
#include "cpu/simd_avx2.h"

namespace qk::avx2 {
namespace {
// 6 sums of two registers each, a vector and an error, in 16 registers.
constexpr int kRows = 6, kVectors = 1;
}  // namespace
}  // namespace qk::avx2

#include "cpu/awq.inl"
