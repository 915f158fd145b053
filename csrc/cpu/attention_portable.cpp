// The kernels of attention.h for any CPU.
#include "cpu/simd_portable.h"

#include "cpu/attention_words.h"

namespace qk::portable {
namespace {
// The baseline may have no more than 16 registers of four lanes.
constexpr int kRows = 2, kVectors = 1;
using Keys8 = FloatKeys;
using Keys16 = FloatKeys16;
using Values16 = FloatValues<RoundToBFloat16>;
using Values8 = FloatValues<RoundToInteger>;
}  // namespace
}  // namespace qk::portable

#include "cpu/attention.inl"
