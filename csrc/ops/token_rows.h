// Tensors [..., columns] whose leading dimensions may have any strides, row by row.
#pragma once

#include "ops/cpu_ops.h"

namespace qk::cpu {

// Where row i of x begins, in elements.
inline int64_t row_offset(const Tensor& x, int64_t i) {
  int64_t offset = 0;
  for (int64_t d = x.dim() - 2; d >= 0; --d) {
    offset += i % x.size(d) * x.stride(d);
    i /= x.size(d);
  }
  return offset;
}

inline const char* row(const Tensor& x, int64_t i) { return element(x, row_offset(x, i)); }

// Of x, a tensor of rows in a float dtype: how many, and the shapes of what has an element or a
// number for each.
struct Tokens {
  int64_t rows, cols;
  std::vector<int64_t> shape, scale_shape;
};

inline Tokens check_tokens(const char* op, const Tensor& x, const char* name = "x") {
  check(x.dim() >= 1, op, name, " must have at least one dimension");
  check_float(op, name, x);
  check_rows(op, name, x);
  Tokens tokens{1, x.size(-1), {x.sizes().begin(), x.sizes().end()}, {}};
  for (int64_t d = 0; d + 1 < x.dim(); ++d) tokens.rows *= x.size(d);
  tokens.scale_shape = tokens.shape;
  tokens.scale_shape.back() = 1;
  return tokens;
}

}  // namespace qk::cpu
