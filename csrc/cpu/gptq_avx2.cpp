// The kernels of gptq.h for AVX2.
#include "cpu/simd_avx2.h"

namespace qk::avx2 {
namespace {
// 4 sums of two registers each, an error and a factor, in 16 registers.
constexpr int kVectors = 1, kColumns = 4;
}  // namespace
}  // namespace qk::avx2

#include "cpu/gptq.inl"
