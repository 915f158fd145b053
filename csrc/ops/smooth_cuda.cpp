// smoothquant_scales on CUDA. It waits for the device: values that no scale can be made of are told
// by the call that was given them.
#include "cuda/common/smooth.h"

#include "ops/cuda_tensor.h"

namespace qk::cuda {
namespace ops {
namespace {

constexpr auto kOp = "smoothquant_scales";

const float* channels_of(const char* name, const Tensor& x) {
  check(x.dim() == 1 && x.scalar_type() == ScalarType::Float, kOp, name,
        " must be float32 [channels], got ", name_of(x.scalar_type()), " ", text_of(x.sizes()));
  return data_of<float>(kOp, name, x);
}

Tensor smoothquant_scales(const Tensor& activation, const Tensor& weight, double strength,
                          double minimum) {
  check(strength >= 0.0 && strength <= 1.0, kOp, "strength must be in [0, 1], got ", strength);
  check(minimum > 0.0 && minimum <= 1.0, kOp, "minimum must be above 0 and at most 1, got ",
        minimum);
  const float* const a = channels_of("activation", activation);
  const float* const w = channels_of("weight", weight);
  check(activation.size(0) == weight.size(0), kOp, "weight ", text_of(weight.sizes()),
        " must have activation's shape ", text_of(activation.sizes()));
  check_same_device(kOp, "weight", weight, activation);
  const auto guard = use_device_of(activation);
  const Tensor scale = new_tensor(activation, {activation.size(0)}, ScalarType::Float);
  if (scale.numel() == 0) return scale;
  Tensor status = new_tensor(activation, {1}, ScalarType::Int);
  torch::stable::zero_(status);
  check_launch(kOp, smooth_scales(a, w, scale.numel(), strength, minimum, data<float>(scale),
                                  data<int>(status), current_stream(activation)));
  const int bad = fetch(status);
  check(bad == 0, kOp, bad & kBadActivation ? "activation" : "weight",
        " must be finite and not negative");
  return scale;
}

}  // namespace
}  // namespace ops
}  // namespace qk::cuda

QUANTKIT_CUDA_OPS(m) {
  m.impl("smoothquant_scales", TORCH_BOX(&qk::cuda::ops::smoothquant_scales));
}
