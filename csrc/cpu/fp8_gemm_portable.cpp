// The kernels of fp8_gemm.h for any CPU.
#include "cpu/simd_portable.h"

namespace qk::portable {
namespace {
constexpr int kTileRows = 2, kTileVectors = 1;
}  // namespace
}  // namespace qk::portable

#include "cpu/fp8_gemm.inl"
