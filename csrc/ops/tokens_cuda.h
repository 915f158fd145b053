// x [..., cols] of an op that works token by token, as a matrix.
#pragma once

#include "ops/cuda_tensor.h"

namespace qk::cuda {

// The matrix of x's tokens, and the shapes of what has an element or a number for each.
struct Tokens {
  Matrix matrix;
  Shape shape, scale_shape;
};

inline Tokens tokens_of(const char* op, const char* name, const Tensor& x) {
  check_float(op, name, x);
  check(on_device(x), op, name, " must be on a CUDA device");
  check(x.dim() >= 1, op, name, " must have at least one dimension");
  const int64_t last = x.dim() - 1, cols = x.size(last);
  int64_t rows = 1, row_stride = 0;
  for (int64_t d = last - 1; d >= 0; --d) {
    if (x.size(d) != 1 && rows > 1) {
      check(x.numel() == 0 || x.stride(d) == rows * row_stride, op, "the dimensions of ", name, " ",
            text_of(x.sizes()),
            " before the last must be one evenly strided run of tokens, got strides ",
            text_of(x.strides()), "; call .contiguous() on it");
    } else if (x.size(d) != 1) {
      row_stride = x.stride(d);
    }
    rows *= x.size(d);
  }
  check_extent(op, name, rows, cols);
  Shape scale_shape = shape_of(x);
  scale_shape.back() = 1;
  return {{x.const_data_ptr(), dtype_of(op, x.scalar_type()), static_cast<int>(rows),
           static_cast<int>(cols), row_stride, x.stride(last)},
          shape_of(x),
          scale_shape};
}

}  // namespace qk::cuda
