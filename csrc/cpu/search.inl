// The table of search.h for one ISA.
#include "cpu/search_impl.h"

namespace qk::QK_ISA {
namespace {

void losses(DType dtype, const void* x, int64_t stride, int64_t rows, int64_t cols,
            int64_t block_cols, const float* low, const float* high, const float* importance,
            const ScaleSearch& how, float* scratch, double* sums) {
  visit_float(dtype, [&]<class T>(T) {
    block_row_losses(static_cast<const T*>(x), stride, rows, cols, block_cols, low, high,
                     importance, how, scratch, sums);
  });
}

}  // namespace

extern const SearchKernels search;
const SearchKernels search = {losses, choose_scales};

}  // namespace qk::QK_ISA
