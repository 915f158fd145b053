// The kernels of gptq.h for any CPU.
#include "cpu/simd_portable.h"

namespace qk::portable {
namespace {
// The baseline may have no more than 16 registers of four lanes.
constexpr int kVectors = 1, kColumns = 2;
}  // namespace
}  // namespace qk::portable

#include "cpu/gptq.inl"
