// The table of reduce.h for one ISA.
#include "cpu/reduce_impl.h"

namespace qk::QK_ISA {
namespace {

void absmax(DType dtype, const void* x, int64_t row_stride, int64_t rows, int64_t cols,
            int64_t block_cols, void* scratch, float* out) {
  visit_float(dtype, [&]<class T>(T) {
    block_row_absmax(static_cast<const T*>(x), row_stride, rows, cols, block_cols, scratch, out);
  });
}

void minmax(DType dtype, const void* x, int64_t row_stride, int64_t rows, int64_t cols,
            int64_t block_cols, void* scratch, float* low, float* high) {
  visit_float(dtype, [&]<class T>(T) {
    block_row_minmax(static_cast<const T*>(x), row_stride, rows, cols, block_cols, scratch, low,
                     high);
  });
}

}  // namespace

extern const ReduceKernels reduce;
const ReduceKernels reduce = {absmax, minmax};

}  // namespace qk::QK_ISA
