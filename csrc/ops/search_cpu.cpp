// mse_scale and percentile_scale on the CPU.
#include "cpu/search.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "ops/cpu_ops.h"

namespace qk::cpu {
namespace {

struct Extremes {
  Tensor low, high;  // low is not defined where only the absmax is asked for
};

// Of every block, finite.
Extremes finite_extremes(const char* op, const Tensor& x, const Block& block, bool symmetric) {
  Extremes found;
  if (symmetric) {
    found.high = absmax(x, block);
  } else {
    std::tie(found.low, found.high) = minmax(x, block);
  }
  for (const Tensor* t : {&found.high, &found.low}) {
    if (symmetric && t == &found.low) continue;
    const float* values = static_cast<const float*>(t->const_data_ptr());
    for (int64_t i = 0; i < t->numel(); ++i) {
      check(std::isfinite(values[i]), op, "x must be finite");
    }
  }
  return found;
}

// Scaled by a power of two so that the largest is 1 .. 2: no sum of weighted errors overflows.
std::vector<float> unit_importance(const char* op, const Tensor& x, const Tensor& importance) {
  check(importance.dim() == 1 && importance.size(0) == x.size(1) &&
            importance.scalar_type() == ScalarType::Float,
        op, "importance must be float32 [", x.size(1), "], one value a column of x");
  check(importance.is_contiguous(), op, "importance must be contiguous, got strides ",
        text_of(importance.strides()));
  check_same_device(op, "importance", importance, x);
  const float* values = static_cast<const float*>(importance.const_data_ptr());
  std::vector<float> result(values, values + importance.numel());
  float most = 0.0f;
  for (float value : result) {
    check(std::isfinite(value) && value >= 0.0f, op, "importance must be finite and not negative");
    most = std::max(most, value);
  }
  int exponent = 0;
  std::frexp(most, &exponent);
  for (float& value : result) value = std::ldexp(value, 1 - exponent);
  return result;
}

void check_codes(const char* op, int64_t q_min, int64_t q_max, bool symmetric, double divisor) {
  check_code_range(op, q_min, q_max);
  check(!symmetric || (q_min <= 0 && 0 <= q_max), op, "[q_min, q_max] must hold 0, got [", q_min,
        ", ", q_max, "]");
  check(!symmetric || (divisor > 0.0 && std::isfinite(divisor)), op,
        "divisor must be positive, got ", divisor);
}

}  // namespace

std::tuple<Tensor, Tensor> mse_scale(const Tensor& x, const Block& block,
                                     const std::optional<Tensor>& importance, int64_t q_min,
                                     int64_t q_max, bool symmetric, double divisor,
                                     ScalarType scale_dtype, double norm, double search_range,
                                     int64_t search_steps) {
  constexpr auto kOp = "mse_scale";
  const Grid grid = check_matrix(kOp, x, block);
  check_float(kOp, "x", x);
  check_rows(kOp, "x", x);
  check_codes(kOp, q_min, q_max, symmetric, divisor);
  check_scale_dtype(kOp, scale_dtype);
  check(norm > 0.0 && norm <= 8.0, kOp, "norm must be above 0 and at most 8, got ", norm);
  check(search_range >= 0.0 && search_range < 1.0, kOp, "search_range must be in [0, 1), got ",
        search_range);
  check(search_steps >= 0 && search_steps <= 1000, kOp, "search_steps must be 0 to 1000, got ",
        search_steps);
  std::vector<float> weights;
  if (importance) weights = unit_importance(kOp, x, *importance);
  const Extremes range = finite_extremes(kOp, x, block, symmetric);
  Tensor scale = empty(x, {grid.rows, grid.cols}, ScalarType::Float);
  Tensor zero_point = symmetric ? empty(x, {0}, ScalarType::Char)
                                : empty(x, {grid.rows, grid.cols}, ScalarType::Char);
  if (scale.numel() == 0) return {scale, zero_point};
  std::vector<float> fractions(search_steps + 1, 1.0f);
  for (int64_t i = 1; i <= search_steps; ++i) {
    fractions[i] = static_cast<float>(1.0 - search_range * static_cast<double>(i) /
                                                static_cast<double>(search_steps));
  }
  const ScaleSearch how{static_cast<int>(q_min),
                        static_cast<int>(q_max),
                        symmetric,
                        static_cast<float>(divisor),
                        dtype_of(kOp, scale_dtype),
                        static_cast<float>(norm),
                        fractions.data(),
                        search_steps + 1};
  const DType dtype = dtype_of(kOp, x.scalar_type());
  const float* high = static_cast<const float*>(range.high.const_data_ptr());
  const float* low = symmetric ? nullptr : static_cast<const float*>(range.low.const_data_ptr());
  float* const scales = data<float>(scale);
  int8_t* const zeros = symmetric ? nullptr : data<int8_t>(zero_point);
  const int64_t size = grid.block_rows * grid.block_cols * how.candidates;
  parallel_rows(grid.rows * grid.cols, size, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(search_scratch_floats(how.candidates));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / grid.cols * grid.block_rows, col = i % grid.cols * grid.block_cols;
      const SearchBlock part{element(x, row * x.stride(0) + col),
                             x.stride(0),
                             std::min(grid.block_rows, x.size(0) - row),
                             std::min(grid.block_cols, x.size(1) - col),
                             low ? std::min(low[i], 0.0f) : 0.0f,
                             std::max(high[i], 0.0f),
                             importance ? weights.data() + col : nullptr,
                             scales + i,
                             zeros ? zeros + i : nullptr};
      search_kernels().block(dtype, how, part, scratch.data());
    }
  });
  return {scale, zero_point};
}

}  // namespace qk::cpu

STABLE_TORCH_LIBRARY_IMPL(quantkit, CPU, m) { m.impl("mse_scale", TORCH_BOX(&qk::cpu::mse_scale)); }
