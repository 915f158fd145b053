// percentile_scale on CUDA. It does not wait for the device: where x is not finite, the scale is
// NaN.
#include "cuda/common/percentile.h"

#include <tuple>

#include "ops/cuda_tensor.h"
#include "ops/search_check.h"

namespace qk::cuda {
namespace ops {
namespace {

constexpr auto kOp = "percentile_scale";

std::tuple<Tensor, Tensor> percentile_scale(const Tensor& x, IntList block, double percentile,
                                            int64_t q_min, int64_t q_max, bool symmetric,
                                            double divisor, ScalarType scale_dtype) {
  const Matrix matrix = float_matrix(kOp, x);
  const Blocks blocks = blocks_of(kOp, x, check_matrix(kOp, x, block));
  check_search_codes(kOp, q_min, q_max, symmetric, divisor);
  check_scale_dtype(kOp, scale_dtype);
  check_percentile(kOp, percentile);
  check(int64_t{blocks.rows} * ((blocks.cols + 7) / 8) <= kMaxExtent, kOp, "blocks of ",
        blocks.rows, " x ", blocks.cols, " elements are too large; the CUDA kernels take ",
        kMaxExtent, " runs of 8");
  const PercentileScale how{
      percentile / 100, static_cast<int>(q_min),     static_cast<int>(q_max),
      symmetric,        static_cast<float>(divisor), dtype_of(kOp, scale_dtype)};
  const auto guard = use_device_of(x);
  const Tensor scale = new_tensor(x, grid_shape(blocks), ScalarType::Float);
  const Tensor zero_point =
      new_tensor(x, symmetric ? Shape{0} : grid_shape(blocks), ScalarType::Char);
  if (scale.numel() == 0 || x.numel() == 0) return {scale, zero_point};
  const Tensor workspace =
      new_tensor(x, {percentile_workspace(blocks, how) / 8}, ScalarType::Double);
  check_launch(
      kOp, percentile_scales(matrix, blocks, how, data<double>(workspace), data<float>(scale),
                             symmetric ? nullptr : data<int8_t>(zero_point), current_stream(x)));
  return {scale, zero_point};
}

}  // namespace
}  // namespace ops
}  // namespace qk::cuda

QUANTKIT_CUDA_OPS(m) { m.impl("percentile_scale", TORCH_BOX(&qk::cuda::ops::percentile_scale)); }
