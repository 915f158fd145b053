// mse_scale on the CPU.
#include "cpu/search.h"

#include <algorithm>
#include <cmath>

#include "ops/search.h"

namespace qk::cpu {
namespace {

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

// Ratios of the range, from the whole of it.
std::vector<float> shrink_of(double range, int64_t steps) {
  std::vector<float> shrink(steps + 1, 1.0f);
  for (int64_t i = 1; i <= steps; ++i) {
    shrink[i] =
        static_cast<float>(1.0 - range * static_cast<double>(i) / static_cast<double>(steps));
  }
  return shrink;
}

// x cut for the threads: rows of blocks, and where those are few, runs of their rows. The cut
// depends on the shape alone, so that the sums do not change with the number of threads.
struct Cut {
  Cut(const Grid& grid, int64_t cols) {
    constexpr int64_t kPieces = 32, kElements = 4096;
    const int64_t wanted = (kPieces + grid.rows - 1) / grid.rows;
    run = std::max((grid.block_rows + wanted - 1) / wanted, kElements / cols + 1);
    run = std::min(run, grid.block_rows);
    runs = (grid.block_rows + run - 1) / run;
  }
  int64_t run, runs;  // rows to a run, runs to a row of blocks
};

}  // namespace

std::tuple<Tensor, Tensor> mse_scale(const Tensor& x, const Block& block,
                                     const std::optional<Tensor>& importance, int64_t q_min,
                                     int64_t q_max, bool symmetric, double divisor,
                                     ScalarType scale_dtype, double norm, double search_range,
                                     int64_t search_steps, bool signs) {
  constexpr auto kOp = "mse_scale";
  const Grid grid = check_matrix(kOp, x, block);
  check_float(kOp, "x", x);
  check_rows(kOp, "x", x);
  check(!signs || (symmetric && q_min < 0), kOp,
        "signs are for symmetric codes with a negative q_min");
  check_search_codes(kOp, q_min, q_max, symmetric, signs ? -static_cast<double>(q_min) : divisor);
  check_scale_dtype(kOp, scale_dtype);
  check(norm > 0.0 && norm <= 8.0, kOp, "norm must be above 0 and at most 8, got ", norm);
  check(search_range >= 0.0 && search_range < 1.0, kOp, "search_range must be in [0, 1), got ",
        search_range);
  check(search_steps >= 0 && search_steps <= 1000, kOp, "search_steps must be 0 to 1000, got ",
        search_steps);
  std::vector<float> weights;
  if (importance) weights = unit_importance(kOp, x, *importance);
  Tensor low = empty(x, {0}, ScalarType::Float), high = low;
  if (symmetric) {
    high = absmax(x, block);
  } else {
    std::tie(low, high) = minmax(x, block);
  }
  check_finite(kOp, low);
  check_finite(kOp, high);
  Tensor scale = empty(x, {grid.rows, grid.cols}, ScalarType::Float);
  Tensor zero_point = symmetric ? empty(x, {0}, ScalarType::Char)
                                : empty(x, {grid.rows, grid.cols}, ScalarType::Char);
  if (scale.numel() == 0) return {scale, zero_point};

  const std::vector<float> shrink = shrink_of(search_range, search_steps);
  const ScaleSearch how{shrink.data(),
                        static_cast<int>(shrink.size()),
                        signs,
                        static_cast<int>(q_min),
                        static_cast<int>(q_max),
                        symmetric,
                        static_cast<float>(signs ? -q_min : divisor),
                        dtype_of(kOp, scale_dtype),
                        static_cast<float>(norm)};
  const DType dtype = dtype_of(kOp, x.scalar_type());
  const int64_t rows = x.size(0), cols = x.size(1), tried = grid.cols * how.tried();
  const float* const lows = symmetric ? nullptr : data<float>(low);
  const float* const highs = data<float>(high);
  const auto lows_of = [&](int64_t g) { return lows ? lows + g * grid.cols : nullptr; };
  const auto losses_of = [&](int64_t g, int64_t first, int64_t last, float* scratch, double* sums) {
    std::fill(sums, sums + tried, 0.0);
    search_kernels().losses(dtype, element(x, first * x.stride(0)), x.stride(0), last - first, cols,
                            grid.block_cols, lows_of(g), highs + g * grid.cols,
                            importance ? weights.data() : nullptr, how, scratch, sums);
  };
  const auto choose = [&](int64_t g, const double* sums, float* scratch) {
    search_kernels().choose(lows_of(g), highs + g * grid.cols, grid.cols, sums, how, scratch,
                            data<float>(scale) + g * grid.cols,
                            symmetric ? nullptr : data<int8_t>(zero_point) + g * grid.cols);
  };

  const Cut cut(grid, cols);
  std::vector<double> partial(cut.runs > 1 ? grid.rows * cut.runs * tried : 0);
  parallel_rows(grid.rows * cut.runs, cut.run * cols * how.tried(),
                [&](int64_t begin, int64_t end) {
                  std::vector<float> scratch(search_scratch_floats(how));
                  std::vector<double> sums(tried);
                  for (int64_t i = begin; i < end; ++i) {
                    const int64_t g = i / cut.runs, top = g * grid.block_rows;
                    const int64_t first = top + i % cut.runs * cut.run;
                    const int64_t last = std::min({first + cut.run, top + grid.block_rows, rows});
                    if (cut.runs == 1) {
                      losses_of(g, first, last, scratch.data(), sums.data());
                      choose(g, sums.data(), scratch.data());
                    } else if (first < last) {  // the last row of blocks may have fewer runs
                      losses_of(g, first, last, scratch.data(), partial.data() + i * tried);
                    }
                  }
                });
  if (cut.runs == 1) return {scale, zero_point};
  std::vector<float> scratch(search_scratch_floats(how));
  for (int64_t g = 0; g < grid.rows; ++g) {
    double* const sums = partial.data() + g * cut.runs * tried;
    for (int64_t i = tried; i < cut.runs * tried; ++i) sums[i % tried] += sums[i];
    choose(g, sums, scratch.data());
  }
  return {scale, zero_point};
}

}  // namespace qk::cpu

STABLE_TORCH_LIBRARY_IMPL(quantkit, CPU, m) { m.impl("mse_scale", TORCH_BOX(&qk::cpu::mse_scale)); }
