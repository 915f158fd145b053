// The table of gram.h for one ISA.
#include "cpu/gram_impl.h"

namespace qk::QK_ISA {
namespace {

void pack(DType dtype, const void* x, int64_t stride, int64_t tokens, int64_t first, int64_t cols,
          void* packed) {
#ifdef QK_PAIRS
  if (dtype == DType::kBFloat16) {
    return pack_pairs(static_cast<const BFloat16*>(x), stride, tokens, first, cols,
                      static_cast<int32_t*>(packed));
  }
#endif
  visit_float(dtype, [&]<class T>(T) {
    pack_floats(static_cast<const T*>(x), stride, tokens, first, cols, static_cast<float*>(packed));
  });
}

void stripe(DType dtype, const void* packed, int64_t panel, int64_t tokens, int64_t first,
            int64_t cols, float* g) {
#ifdef QK_PAIRS
  if (dtype == DType::kBFloat16) {
    return gram_stripe<PairWords>(packed, panel, tokens, first, cols, g);
  }
#endif
  static_cast<void>(dtype);
  gram_stripe<FloatWords>(packed, panel, tokens, first, cols, g);
}

}  // namespace

extern const GramKernels gram;
const GramKernels gram = {kVectors * kLanes, pack, stripe};

}  // namespace qk::QK_ISA
