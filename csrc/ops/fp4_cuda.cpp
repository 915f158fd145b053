// quantize_fp4 and unpack_fp4 on CUDA.
#include "cuda/common/fp4.h"

#include "ops/cuda_tensor.h"
#include "ops/pack_check.h"

namespace qk::cuda {
namespace ops {
namespace {

Tensor quantize_fp4(const Tensor& x, const Tensor& scale, int64_t group_size) {
  constexpr auto kOp = "quantize_fp4";
  const Grid grid = check_quantize_fp4(kOp, x, scale, group_size);
  const Matrix matrix = float_matrix(kOp, x);
  const Blocks blocks = blocks_of(kOp, x, grid);
  const float* scales = data_of<float>(kOp, "scale", scale);
  const auto guard = use_device_of(x);
  const Tensor bytes = new_tensor(x, {matrix.rows, matrix.cols / 2}, ScalarType::Byte);
  check_launch(kOp, cuda::quantize_fp4(matrix, scales, blocks.grid_cols, blocks.cols,
                                       bytes.mutable_data_ptr(), current_stream(x)));
  return bytes;
}

Tensor unpack_fp4(const Tensor& packed) {
  constexpr auto kOp = "unpack_fp4";
  check_unpack_fp4(kOp, packed);
  check(on_device(packed), kOp, "packed must be on a CUDA device");
  check_extent(kOp, "packed", packed.size(0), 2 * packed.size(1));
  const int rows = static_cast<int>(packed.size(0)), cols = static_cast<int>(2 * packed.size(1));
  const auto guard = use_device_of(packed);
  const Tensor codes = new_tensor(packed, {rows, cols}, ScalarType::Float8_e4m3fn);
  check_launch(kOp, cuda::unpack_fp4(packed.const_data_ptr(), packed.stride(0), rows, cols,
                                     codes.mutable_data_ptr(), current_stream(packed)));
  return codes;
}

}  // namespace
}  // namespace ops
}  // namespace qk::cuda

QUANTKIT_CUDA_OPS(m) {
  m.impl("quantize_fp4", TORCH_BOX(&qk::cuda::ops::quantize_fp4));
  m.impl("unpack_fp4", TORCH_BOX(&qk::cuda::ops::unpack_fp4));
}
