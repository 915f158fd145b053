// The table of histogram.h for one ISA.
#include "cpu/histogram_impl.h"

namespace qk::QK_ISA {
namespace {

void count(DType dtype, const void* x, int64_t n, float bins, uint32_t* even, uint32_t* odd) {
  visit_float(dtype,
              [&]<class T>(T) { count_values(static_cast<const T*>(x), n, bins, even, odd); });
}

}  // namespace

extern const HistogramKernels histogram;
const HistogramKernels histogram = {count};

}  // namespace qk::QK_ISA
