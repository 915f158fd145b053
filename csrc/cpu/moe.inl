// The table of moe.h for one ISA.
#include "cpu/moe.h"
#include "cpu/numeric.inl"

namespace qk::QK_ISA {
namespace {

void scale_rows(DType dtype, void* y, int64_t stride, int64_t begin, int64_t end, int64_t cols,
                const float* scale) {
  visit_float(dtype, [&]<class T>(T) {
    for (int64_t r = begin; r < end; ++r) {
      T* const row = static_cast<T*>(y) + r * stride;
      const F32 factor = broadcast(scale[r]);
      for_lanes(cols, [&](int64_t c, auto lanes) {
        store(row + c, load(row + c, lanes) * factor, lanes);
      });
    }
  });
}

}  // namespace

extern const MoeKernels moe;
const MoeKernels moe = {scale_rows};

}  // namespace qk::QK_ISA
