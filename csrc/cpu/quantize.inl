// The table of quantize.h for one ISA.
#include "cpu/quantize_impl.h"

namespace qk::QK_ISA {
namespace {

// f(row, index of the row's first scale) for the rows asked for.
template <class Body>
QK_INLINE void for_rows(const Rows& x, const Scales& grid, Body body) {
  for (int64_t r = x.begin; r < x.end; ++r) body(r, r / grid.block_rows * grid.cols);
}

void quantize_int(DType dtype, Rows x, Scales grid, int q_min, int q_max, int8_t* q) {
  visit_float(dtype, [&]<class T>(T) {
    for_rows(x, grid, [&](int64_t r, int64_t first) {
      const int8_t* zero_point = grid.zero_point ? grid.zero_point + first : nullptr;
      row_quantize_int<T>(static_cast<const T*>(x.data) + r * x.stride, nullptr, x.cols,
                          grid.block_cols, grid.scale + first, zero_point, q_min, q_max,
                          q + r * x.cols);
    });
  });
}

void quantize_fp8(DType dtype, Rows x, Scales grid, DType format, uint8_t* q) {
  visit_float(dtype, [&]<class T>(T) {
    visit_fp8(format, [&](auto fp8) {
      for_rows(x, grid, [&](int64_t r, int64_t first) {
        row_quantize_fp8<false, T>(static_cast<const T*>(x.data) + r * x.stride, nullptr, x.cols,
                                   grid.block_cols, grid.scale + first, fp8, q + r * x.cols);
      });
    });
  });
}

void dequantize(DType format, Rows q, Scales grid, DType dtype, void* out) {
  visit_float(dtype, [&]<class T>(T) {
    visit_code(format, [&](auto code) {
      for_rows(q, grid, [&](int64_t r, int64_t first) {
        const int8_t* zero_point = grid.zero_point ? grid.zero_point + first : nullptr;
        row_dequantize(static_cast<const uint8_t*>(q.data) + r * q.stride, q.cols, grid.block_cols,
                       grid.scale + first, zero_point, code, static_cast<T*>(out) + r * q.cols);
      });
    });
  });
}

}  // namespace

extern const QuantizeKernels quantize;
const QuantizeKernels quantize = {quantize_int, quantize_fp8, dequantize};

}  // namespace qk::QK_ISA
