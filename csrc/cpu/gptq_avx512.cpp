// The kernels of gptq.h for AVX-512.
#include "cpu/simd_avx512.h"

namespace qk::avx512 {
namespace {
// 24 sums, 3 vectors of errors and a factor, in 32 registers.
constexpr int kVectors = 3, kColumns = 8;
}  // namespace
}  // namespace qk::avx512

#include "cpu/gptq.inl"
