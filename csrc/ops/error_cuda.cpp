// quantization_error on CUDA.
#include "cuda/common/error.h"

#include "ops/cuda_tensor.h"

namespace qk::cuda {
namespace ops {
namespace {

Tensor error(const Tensor& x, const Tensor& q, const Tensor& scale,
             const OptionalTensor& zero_point, IntList block) {
  constexpr auto kOp = "quantization_error";
  const Matrix source = float_matrix(kOp, x);
  const Matrix codes = matrix_of(kOp, "q", q);
  check_quantized(kOp, "q", q);
  check(codes.rows == source.rows && codes.cols == source.cols, kOp, "q ", text_of(q.sizes()),
        " must have x's shape ", text_of(x.sizes()));
  check_same_device(kOp, "q", q, x);
  const Blocks blocks = blocks_of(kOp, x, check_scale(kOp, x, scale, zero_point, block));
  const auto guard = use_device_of(x);
  Tensor result = new_tensor(x, {4}, ScalarType::Double);
  if (x.numel() == 0) return torch::stable::zero_(result);
  const Tensor workspace =
      new_tensor(x, {error_workspace(source.rows, source.cols)}, ScalarType::Double);
  check_launch(
      kOp, quantization_error(source, codes, blocks, scale_data(scale), zero_point_data(zero_point),
                              data<double>(workspace), data<double>(result), current_stream(x)));
  return result;
}

}  // namespace
}  // namespace ops
}  // namespace qk::cuda

QUANTKIT_CUDA_OPS(m) { m.impl("quantization_error", TORCH_BOX(&qk::cuda::ops::error)); }
