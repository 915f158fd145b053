// The table of error.h for one ISA.
#include "cpu/error_impl.h"

namespace qk::QK_ISA {
namespace {

void quantization_error(DType dtype, Rows x, DType format, Rows q, Scales grid, double* out) {
  visit_float(dtype, [&]<class T>(T) {
    visit_code(format, [&](auto code) {
      for (int64_t r = x.begin; r < x.end; ++r) {
        const int64_t first = r / grid.block_rows * grid.cols;
        const int8_t* zero_point = grid.zero_point ? grid.zero_point + first : nullptr;
        row_error(static_cast<const T*>(x.data) + r * x.stride,
                  static_cast<const uint8_t*>(q.data) + r * q.stride, x.cols, grid.block_cols,
                  grid.scale + first, zero_point, code, out + 4 * r);
      }
    });
  });
}

}  // namespace

extern const ErrorKernels error;
const ErrorKernels error = {quantization_error};

}  // namespace qk::QK_ISA
