// The table of gram.h for one ISA.
#include "cpu/gram_impl.h"
#include "cpu/transpose.inl"

namespace qk::QK_ISA {
namespace {

void pack(const GramInput& input, int64_t begin, int64_t end, int64_t first, void* packed,
          float* channels) {
#ifdef QK_PAIRS
  if (input.dtype == DType::kBFloat16) {
    return pack_stripe<PairWords, BFloat16>(input, begin, end, first, packed, channels);
  }
#endif
  visit_float(input.dtype, [&]<class T>(T) {
    pack_stripe<FloatWords, T>(input, begin, end, first, packed, channels);
  });
}

void multiply(DType dtype, const void* packed, int64_t stripe, int64_t tokens, int64_t first,
              int64_t cols, bool fresh, float* g) {
#ifdef QK_PAIRS
  if (dtype == DType::kBFloat16) {
    return gram_stripe<PairWords>(packed, stripe, tokens, first, cols, fresh, g);
  }
#endif
  static_cast<void>(dtype);
  gram_stripe<FloatWords>(packed, stripe, tokens, first, cols, fresh, g);
}

// 16 x 16 numbers at a time, whole cache lines on either side.
void mirror(float* g, int64_t n, int64_t first) {
  const int64_t end = first + kMirrorRows < n ? first + kMirrorRows : n;
  for (int64_t r = first; r < end; r += kLanes) {
    for (int64_t c = 0; c <= r; c += kLanes) {
      if (c < r && r + kLanes <= n) {
        transpose(g + c * n + r, n, g + r * n + c, n);
        continue;
      }
      for (int64_t i = r; i < r + kLanes && i < n; ++i) {
        for (int64_t j = c; j < c + kLanes && j < i; ++j) g[i * n + j] = g[j * n + i];
      }
    }
  }
}

}  // namespace

extern const GramKernels gram;
const GramKernels gram = {kWidth, pack, multiply, mirror};

}  // namespace qk::QK_ISA
