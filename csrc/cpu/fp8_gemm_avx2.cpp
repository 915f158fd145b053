// The kernels of fp8_gemm.h for AVX2.
#include "cpu/simd_avx2.h"

namespace qk::avx2 {
namespace {
// 6 sums of two registers each, two registers of the weight and one of x in 16.
constexpr int kTileRows = 6, kTileVectors = 1;
}  // namespace
}  // namespace qk::avx2

#include "cpu/fp8_gemm.inl"
