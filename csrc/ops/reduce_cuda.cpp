// absmax and minmax on CUDA.
#include "ops/reduce_cuda.h"

#include <tuple>

namespace qk::cuda {

void reduce_blocks(const char* op, const Matrix& x, const Blocks& blocks, const ReduceOutput& out,
                   const Tensor& like) {
  if (x.rows == 0 || x.cols == 0) return;  // and so is the grid
  const cudaStream_t stream = current_stream(like);
  const ReducePlan plan = plan_reduce(x.rows, x.cols, blocks);
  check(int64_t{plan.tiles.rows} * plan.tiles.cols <= kMaxExtent, op, "blocks of ", plan.tiles.rows,
        " x ", plan.tiles.cols, " elements are too large; the CUDA kernels take ", kMaxExtent,
        ", or -1 for a whole extent");
  if (!plan.two_steps) {
    check_launch(op, reduce(x, blocks, out, stream));
    return;
  }
  // Each figure of the tiles is a matrix of floats, of which the same figure is taken again.
  const Shape shape = grid_shape(plan.tiles);
  const auto rest = [&](const Tensor& tiles, const ReduceOutput& figure) {
    const Matrix matrix{tiles.const_data_ptr(), DType::kFloat32,      plan.tiles.grid_rows,
                        plan.tiles.grid_cols,   plan.tiles.grid_cols, 1};
    check_launch(op, reduce(matrix, plan.rest, figure, stream));
  };
  if (out.absmax != nullptr) {
    const Tensor tiles = new_tensor(like, shape, ScalarType::Float);
    check_launch(op, reduce(x, plan.tiles, {data<float>(tiles), nullptr, nullptr}, stream));
    rest(tiles, {out.absmax, nullptr, nullptr});
  }
  if (out.low != nullptr) {
    const Tensor lows = new_tensor(like, shape, ScalarType::Float);
    const Tensor highs = new_tensor(like, shape, ScalarType::Float);
    check_launch(op,
                 reduce(x, plan.tiles, {nullptr, data<float>(lows), data<float>(highs)}, stream));
    rest(lows, {nullptr, out.low, nullptr});
    rest(highs, {nullptr, nullptr, out.high});
  }
}

namespace ops {
namespace {

Tensor absmax(const Tensor& x, IntList block) {
  const Matrix matrix = float_matrix("absmax", x);
  const Blocks blocks = blocks_of("absmax", x, check_matrix("absmax", x, block));
  const auto guard = use_device_of(x);
  const Tensor result = new_tensor(x, grid_shape(blocks), ScalarType::Float);
  reduce_blocks("absmax", matrix, blocks, {data<float>(result), nullptr, nullptr}, x);
  return result;
}

std::tuple<Tensor, Tensor> minmax(const Tensor& x, IntList block) {
  const Matrix matrix = float_matrix("minmax", x);
  const Blocks blocks = blocks_of("minmax", x, check_matrix("minmax", x, block));
  const auto guard = use_device_of(x);
  const Tensor low = new_tensor(x, grid_shape(blocks), ScalarType::Float);
  const Tensor high = new_tensor(x, grid_shape(blocks), ScalarType::Float);
  reduce_blocks("minmax", matrix, blocks, {nullptr, data<float>(low), data<float>(high)}, x);
  return {low, high};
}

}  // namespace
}  // namespace ops
}  // namespace qk::cuda

QUANTKIT_CUDA_OPS(m) {
  m.impl("absmax", TORCH_BOX(&qk::cuda::ops::absmax));
  m.impl("minmax", TORCH_BOX(&qk::cuda::ops::minmax));
}
