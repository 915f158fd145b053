// What the pointwise ops check, whichever kernel serves the call; the words are those of
// ops/pointwise.py.
#pragma once

#include "ops/check.h"

namespace qk {

// `other` is to be what x is, in shape and dtype, but for its strides.
inline void check_like(const char* op, const char* name, const Tensor& other, const char* x_name,
                       const Tensor& x) {
  bool same = other.dim() == x.dim() && other.scalar_type() == x.scalar_type();
  for (int64_t d = 0; same && d < x.dim(); ++d) same = other.size(d) == x.size(d);
  check(same, op, name, " must have ", x_name, "'s shape and dtype, ", name_of(x.scalar_type()),
        " ", text_of(x.sizes()), ", got ", name_of(other.scalar_type()), " ",
        text_of(other.sizes()));
  check_same_device(op, name, other, x);
}

// x [..., cols] has been checked.
inline void check_norm_weight(const char* op, const Tensor& x, const OptionalTensor& residual,
                              const Tensor& weight, double epsilon) {
  const int64_t cols = x.size(-1);
  check(weight.dim() == 1 && weight.size(0) == cols && weight.is_contiguous() &&
            weight.scalar_type() == x.scalar_type(),
        op, "weight must be ", name_of(x.scalar_type()), " [", cols, "], got ",
        name_of(weight.scalar_type()), " ", text_of(weight.sizes()));
  check_same_device(op, "weight", weight, x);
  check(epsilon >= 0, op, "epsilon must not be negative, got ", epsilon);
  if (residual) check_like(op, "residual", *residual, "x", x);
}

// Of an op that makes codes of x [..., cols] token by token.
inline void check_codes(const char* op, const Tensor& x, ScalarType dtype) {
  check(dtype == ScalarType::Char || is_fp8(dtype), op,
        "dtype must be int8, float8_e4m3fn or float8_e5m2, got ", name_of(dtype));
  check(x.size(-1) > 0, op, "there must be a column to quantize, got ", text_of(x.sizes()));
}

inline void check_rotary(const char* op, const Tensor& x, const Tensor& cosine,
                         const Tensor& sine) {
  check(x.dim() == 4, op, "x must be 4-D [batch, heads, tokens, size], got ", x.dim(), "-D");
  check_float(op, "x", x);
  check_rows(op, "x", x);
  check(cosine.dim() == 3 && cosine.scalar_type() == x.scalar_type() &&
            (cosine.size(0) == 1 || cosine.size(0) == x.size(0)) && cosine.size(1) == x.size(2) &&
            cosine.size(2) <= x.size(3) && cosine.size(2) % 2 == 0,
        op, "cos must be ", name_of(x.scalar_type()), " [batch or 1, ", x.size(2),
        ", an even number up to ", x.size(3), "], got ", name_of(cosine.scalar_type()), " ",
        text_of(cosine.sizes()));
  check_rows(op, "cos", cosine);
  check_same_device(op, "cos", cosine, x);
  check_like(op, "sin", sine, "cos", cosine);
  check_rows(op, "sin", sine);
}

}  // namespace qk
