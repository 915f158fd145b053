// histogram_scale on CUDA. It does not wait for the device: of what cannot be used, the scale is
// NaN.
#include "cuda/common/histogram_scale.h"

#include <tuple>

#include "ops/cuda_tensor.h"
#include "ops/histogram_check.h"

namespace qk::cuda {
namespace ops {
namespace {

constexpr auto kOp = "histogram_scale";

std::tuple<Tensor, Tensor> histogram_scale(const Tensor& counts, const Tensor& span,
                                           const Tensor& range, int64_t method, double parameter,
                                           int64_t q_min, int64_t q_max, bool symmetric,
                                           double divisor) {
  const ScaleMethod how = check_histogram_scale(kOp, counts, span, range, method, parameter, q_min,
                                                q_max, symmetric, divisor);
  const CodeRange codes{static_cast<int>(q_min), static_cast<int>(q_max), symmetric, divisor};
  const auto guard = use_device_of(counts);
  const Tensor workspace = new_tensor(counts, {kHistogramLosses}, ScalarType::Double);
  const Tensor scale = new_tensor(counts, {1, 1}, ScalarType::Float);
  const Tensor zero_point =
      new_tensor(counts, symmetric ? Shape{0} : Shape{1, 1}, ScalarType::Char);
  check_launch(kOp, cuda::histogram_scale(
                        data_of<int64_t>(kOp, "counts", counts), data_of<float>(kOp, "span", span),
                        data_of<float>(kOp, "range", range), how, parameter, codes,
                        data<double>(workspace), data<float>(scale),
                        symmetric ? nullptr : data<int8_t>(zero_point), current_stream(counts)));
  return {scale, zero_point};
}

}  // namespace
}  // namespace ops
}  // namespace qk::cuda

QUANTKIT_CUDA_OPS(m) { m.impl("histogram_scale", TORCH_BOX(&qk::cuda::ops::histogram_scale)); }
