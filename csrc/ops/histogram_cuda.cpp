// histogram_accumulate on CUDA. It waits for the device at its end: values that no bin takes are
// told by the call that was given them.
#include "cuda/common/histogram.h"

#include "ops/cuda_tensor.h"

namespace qk::cuda {
namespace ops {
namespace {

constexpr auto kOp = "histogram_accumulate";

void histogram_accumulate(const Tensor& x, const OptionalTensor& mask, const Tensor& counts,
                          const Tensor& span) {
  check(x.dim() == 2, kOp, "x must be 2-D [tokens, columns], got ", x.dim(), "-D");
  const Matrix values = float_matrix(kOp, x);
  check(counts.dim() == 1 && counts.size(0) == kHistogramBins &&
            counts.scalar_type() == ScalarType::Long,
        kOp, "counts must be torch.int64 [", kHistogramBins, "], got ",
        name_of(counts.scalar_type()), " ", text_of(counts.sizes()));
  check(span.dim() == 1 && span.size(0) == 1 && span.scalar_type() == ScalarType::Float, kOp,
        "span must be torch.float32 [1], got ", name_of(span.scalar_type()), " ",
        text_of(span.sizes()));
  check(counts.is_contiguous(), kOp, "counts must be contiguous, got strides ",
        text_of(counts.strides()));
  check_same_device(kOp, "counts", counts, x);
  check_same_device(kOp, "span", span, x);
  if (mask) {
    check(
        mask->dim() == 1 && mask->size(0) == values.rows && mask->scalar_type() == ScalarType::Bool,
        kOp, "mask must be torch.bool [", values.rows, "], one value a row of x");
    check_same_device(kOp, "mask", *mask, x);
  }
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
