// histogram_accumulate on CUDA. It waits for the device at its end: values that no bin takes are
// told by the call that was given them.
#include "cuda/common/histogram.h"

#include "ops/cuda_tensor.h"
#include "ops/histogram_check.h"

namespace qk::cuda {
namespace ops {
namespace {

constexpr auto kOp = "histogram_accumulate";

void histogram_accumulate(const Tensor& x, const OptionalTensor& mask, const Tensor& counts,
                          const Tensor& span) {
  check(x.dim() == 2, kOp, "x must be 2-D [tokens, columns], got ", x.dim(), "-D");
  const Matrix values = float_matrix(kOp, x);
  check_accumulate(kOp, x, mask, counts, span);
  if (x.numel() == 0) return;
  const auto guard = use_device_of(x);
  const TokenMask counted{mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr,
                          mask ? mask->stride(0) : 0};
  const Tensor workspace =
      new_tensor(x, {histogram_workspace(values.rows, values.cols)}, ScalarType::Float);
  Tensor status = new_tensor(x, {1}, ScalarType::Int);
  torch::stable::zero_(status);
  check_launch(kOp, histogram(values, counted, data<int64_t>(counts), data<float>(span),
                              data<float>(workspace), data<int>(status), current_stream(x)));
  check(fetch(status) == 0, kOp, "x must be finite and below 2^127");
}

}  // namespace
}  // namespace ops
}  // namespace qk::cuda

QUANTKIT_CUDA_OPS(m) {
  m.impl("histogram_accumulate", TORCH_BOX(&qk::cuda::ops::histogram_accumulate));
}
