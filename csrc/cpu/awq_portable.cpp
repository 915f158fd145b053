// The kernels of awq.h for any CPU.
#include "cpu/simd_portable.h"

namespace qk::portable {
namespace {
// The baseline may have no more than 16 registers of four lanes.
constexpr int kRows = 2, kVectors = 1;
}  // namespace
}  // namespace qk::portable

#include "cpu/awq.inl"
