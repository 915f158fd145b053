// The kernels of wna16.h for any machine.
#include "cpu/simd_portable.h"

namespace qk::portable {
namespace {
constexpr int kTileRows = 2, kTileVectors = 1;
}  // namespace
}  // namespace qk::portable

#include "cpu/wna16.inl"
