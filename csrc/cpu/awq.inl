// The table of awq.h for one ISA.
#include "cpu/awq_impl.h"

namespace qk::QK_ISA {
namespace {

#ifdef QK_PAIRS
constexpr bool kPairs = true;
#else
constexpr bool kPairs = false;
using PairWords = FloatWords;
#endif

void pack(const AwqGram& gram, const float* g, int64_t stride, int64_t first) {
  if (gram.pairs) {
    pack_stripe<PairWords>(gram, g, stride, first);
  } else {
    pack_stripe<FloatWords>(gram, g, stride, first);
  }
}

double loss(const AwqGram& gram, const AwqQuantizer& how, const AwqRows& rows,
            const AwqScratch& scratch) {
  return gram.pairs ? block_loss<PairWords>(gram, how, rows, scratch)
                    : block_loss<FloatWords>(gram, how, rows, scratch);
}

}  // namespace

extern const AwqKernels awq;
const AwqKernels awq = {kRows, kTile, kPairs, pack, loss};

}  // namespace qk::QK_ISA
