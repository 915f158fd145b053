// What gptq_sweep asks of its arguments, whichever kernel serves the call.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "ops/check.h"

namespace qk {

// w [batch, rows, cols], the first of which may be missing; one factor for all, or one for each.
struct SweepShape {
  bool batched;
  int64_t batch, rows, cols, groups, size;
  int64_t factors;  // 1 or batch

  // [batch, rows, last], [rows, last], or without `last` if that is -1.
  std::vector<int64_t> with(int64_t last) const {
    std::vector<int64_t> shape;
    if (batched) shape.push_back(batch);
    shape.push_back(rows);
    if (last >= 0) shape.push_back(last);
    return shape;
  }
};

struct SweepArguments {
  const Tensor& w;
  const Tensor& factor;
  const std::optional<Tensor>& scale;
  const std::optional<Tensor>& zero_point;
  const std::optional<Tensor>& g_idx;
  int64_t group_size, q_min, q_max;
  ScalarType scale_dtype;
  double search_range;
  int64_t search_steps;
  bool symmetric, signs;
  int64_t float_bits;
};

inline SweepShape check_sweep(const char* op, const SweepArguments& a) {
  const int64_t dim = a.w.dim();
  check((dim == 2 || dim == 3) && a.w.scalar_type() == ScalarType::Float, op,
        "w must be torch.float32 [rows, K] or [B, rows, K], got ", name_of(a.w.scalar_type()), " ",
        text_of(a.w.sizes()));
  SweepShape shape = {dim == 3, dim == 3 ? a.w.size(0) : 1, a.w.size(-2), a.w.size(-1), 0, 0, 1};
  const int64_t cols = shape.cols;
  const bool own = a.factor.dim() == 3 && dim == 3 && a.factor.size(0) == shape.batch;
  check((a.factor.dim() == 2 || own) && a.factor.size(-2) == cols && a.factor.size(-1) == cols &&
            a.factor.scalar_type() == ScalarType::Float,
        op, "factor must be torch.float32 [", cols, ", ", cols,
        "], or as many as w has matrices, got ", name_of(a.factor.scalar_type()), " ",
        text_of(a.factor.sizes()));
  if (own) shape.factors = shape.batch;
  check_rows(op, "w", a.w);
  check_rows(op, "factor", a.factor);
  check(a.group_size == -1 || a.group_size > 0, op,
        "group_size must be positive, or -1 for the whole row, got ", a.group_size);
  check(-128 <= a.q_min && a.q_min < a.q_max && a.q_max <= 127, op,
        "[q_min, q_max] must fit int8, got [", a.q_min, ", ", a.q_max, "]");
  check_scale_dtype(op, a.scale_dtype);
  check(a.search_steps >= 0 && a.search_range >= 0 && a.search_range < 1, op,
        "search_steps must be >= 0 and search_range in [0, 1), got ", a.search_steps, " and ",
        a.search_range);
  check(!a.signs || (a.symmetric && !a.scale && a.q_min < 0), op,
        "signs are for symmetric codes with a negative q_min, and scales that are computed here");
  check(a.float_bits == 0 || a.float_bits == 4 || a.float_bits == 8, op,
        "float_bits must be 0 (integers), 4 or 8, got ", a.float_bits);
  check(a.float_bits == 0 || (a.scale && !a.zero_point), op,
        "float_bits go with a given scale and no zero_point");
  shape.size = a.group_size == -1 ? (cols > 0 ? cols : 1) : a.group_size;
  shape.groups = (cols + shape.size - 1) / shape.size;

  const std::vector<int64_t> wanted = shape.with(shape.groups);
  const std::string text = text_of({wanted.data(), wanted.size()});
  if (a.scale) {
    check(text_of(a.scale->sizes()) == text && a.scale->scalar_type() == ScalarType::Float, op,
          "scale must be torch.float32 ", text, ", got ", name_of(a.scale->scalar_type()), " ",
          text_of(a.scale->sizes()));
    check(a.scale->is_contiguous(), op, "scale must be contiguous, got strides ",
          text_of(a.scale->strides()));
  } else {
    check(!a.zero_point && !a.g_idx, op,
          "zero_point and g_idx go with a given scale; without one they are computed");
  }
  if (a.zero_point) {
    check(text_of(a.zero_point->sizes()) == text && a.zero_point->scalar_type() == ScalarType::Char,
          op, "zero_point must be torch.int8 ", text);
    check(a.zero_point->is_contiguous(), op, "zero_point must be contiguous, got strides ",
          text_of(a.zero_point->strides()));
  }
  if (a.g_idx) {
    check(a.g_idx->dim() == 1 && a.g_idx->size(0) == cols &&
              a.g_idx->scalar_type() == ScalarType::Int,
          op, "g_idx must be torch.int32 [", cols, "], got ", name_of(a.g_idx->scalar_type()), " ",
          text_of(a.g_idx->sizes()));
    check(a.g_idx->is_contiguous(), op, "g_idx must be contiguous");
  }
  return shape;
}

}  // namespace qk
