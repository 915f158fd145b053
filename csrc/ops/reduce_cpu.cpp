// absmax and minmax on the CPU.
#include "cpu/reduce.h"

#include <algorithm>

#include "ops/cpu_ops.h"

namespace qk::cpu {
namespace {

// low is null for absmax, which goes to high.
struct Extremes {
  float* low;
  float* high;
  Extremes at(int64_t i) const { return {low ? low + i : nullptr, high + i}; }
};

void reduce_block_row(DType dtype, const void* x, int64_t stride, int64_t rows, int64_t cols,
                      int64_t block_cols, void* scratch, Extremes out) {
  if (out.low) {
    reduce_kernels().minmax(dtype, x, stride, rows, cols, block_cols, scratch, out.low, out.high);
  } else {
    reduce_kernels().absmax(dtype, x, stride, rows, cols, block_cols, scratch, out.high);
  }
}

// Where there are few rows of blocks, each is cut into runs of rows for the threads, and the
// extremes of the runs, a matrix of fp32, are reduced once more. Extremes are exact, so the cut
// leaves no trace in the result.
void reduce(const char* op, const Tensor& x, const Grid& grid, Extremes out) {
  const int64_t rows = x.size(0), cols = x.size(1);
  const DType dtype = dtype_of(op, x.scalar_type());
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t wanted = grid.rows >= 2 * threads ? 1 : (2 * threads + grid.rows - 1) / grid.rows;
  const int64_t run = std::max<int64_t>((grid.block_rows + wanted - 1) / wanted,
                                        std::min<int64_t>(grid.block_rows, 32));
  const int64_t runs = (grid.block_rows + run - 1) / run;
  const int64_t scratch_bytes = grid.block_rows > 1 ? reduce_scratch_bytes(cols) : 0;

  std::vector<float> partial(runs > 1 ? 2 * grid.rows * runs * grid.cols : 0);
  Extremes runs_out = out;
  if (runs > 1) {
    float* high = partial.data() + grid.rows * runs * grid.cols;
    runs_out = {out.low ? partial.data() : nullptr, high};
  }
  parallel_rows(grid.rows * runs, run * cols, [&](int64_t begin, int64_t end) {
    std::vector<char> scratch(scratch_bytes);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / runs * grid.block_rows + i % runs * run;
      const int64_t last = std::min({first + run, (i / runs + 1) * grid.block_rows, rows});
      if (first >= last) continue;  // the last row of blocks may have fewer runs
      reduce_block_row(dtype, element(x, first * x.stride(0)), x.stride(0), last - first, cols,
                       grid.block_cols, scratch.data(), runs_out.at(i * grid.cols));
    }
  });
  if (runs == 1) return;
  std::vector<char> scratch(reduce_scratch_bytes(grid.cols));
  std::vector<float> unused(grid.cols);
  for (int64_t g = 0; g < grid.rows; ++g) {
    const int64_t block_rows = std::min(grid.block_rows, rows - g * grid.block_rows);
    const int64_t n = (block_rows + run - 1) / run, first = g * runs * grid.cols;
    const Extremes part = runs_out.at(first), result = out.at(g * grid.cols);
    if (out.low) {
      reduce_block_row(DType::kFloat32, part.low, grid.cols, n, grid.cols, 1, scratch.data(),
                       {result.low, unused.data()});
      reduce_block_row(DType::kFloat32, part.high, grid.cols, n, grid.cols, 1, scratch.data(),
                       {unused.data(), result.high});
    } else {
      reduce_block_row(DType::kFloat32, part.high, grid.cols, n, grid.cols, 1, scratch.data(),
                       result);
    }
  }
}

}  // namespace

Tensor absmax(const Tensor& x, const Block& block) {
  const Grid grid = check_matrix("absmax", x, block);
  check_float("absmax", "x", x);
  check_rows("absmax", "x", x);
  Tensor high = empty(x, {grid.rows, grid.cols}, ScalarType::Float);
  if (x.numel() > 0) reduce("absmax", x, grid, {nullptr, data<float>(high)});
  return high;
}

std::tuple<Tensor, Tensor> minmax(const Tensor& x, const Block& block) {
  const Grid grid = check_matrix("minmax", x, block);
  check_float("minmax", "x", x);
  check_rows("minmax", "x", x);
  Tensor low = empty(x, {grid.rows, grid.cols}, ScalarType::Float);
  Tensor high = empty(x, {grid.rows, grid.cols}, ScalarType::Float);
  if (x.numel() > 0) reduce("minmax", x, grid, {data<float>(low), data<float>(high)});
  return {low, high};
}

}  // namespace qk::cpu

STABLE_TORCH_LIBRARY_IMPL(quantkit, CPU, m) {
  m.impl("absmax", TORCH_BOX(&qk::cpu::absmax));
  m.impl("minmax", TORCH_BOX(&qk::cpu::minmax));
}
