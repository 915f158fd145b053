// smoothquant_scales on the CPU: one power a channel, which needs no kernel of its own for each
// instruction set.
#include <cmath>
#include <limits>

#include "ops/cpu_ops.h"

namespace qk::cpu {
namespace {

void check_absmax(const char* op, const char* name, const Tensor& x) {
  check(x.dim() == 1 && x.scalar_type() == ScalarType::Float, op, name,
        " must be float32 [channels], got ", name_of(x.scalar_type()), " ", text_of(x.sizes()));
  check(x.is_contiguous(), op, name, " must be contiguous, got strides ", text_of(x.strides()));
  const float* values = static_cast<const float*>(x.const_data_ptr());
  for (int64_t i = 0; i < x.numel(); ++i) {
    check(std::isfinite(values[i]) && values[i] >= 0.0f, op, name,
          " must be finite and not negative");
  }
}

}  // namespace

Tensor smoothquant_scales(const Tensor& activation, const Tensor& weight, double strength,
                          double minimum) {
  constexpr auto kOp = "smoothquant_scales";
  check(strength >= 0.0 && strength <= 1.0, kOp, "strength must be in [0, 1], got ", strength);
  check(minimum > 0.0 && minimum <= 1.0, kOp, "minimum must be above 0 and at most 1, got ",
        minimum);
  check_absmax(kOp, "activation", activation);
  check_absmax(kOp, "weight", weight);
  check(activation.size(0) == weight.size(0), kOp, "weight ", text_of(weight.sizes()),
        " must have activation's shape ", text_of(activation.sizes()));
  check_same_device(kOp, "weight", weight, activation);
  Tensor scale = empty(activation, {activation.size(0)}, ScalarType::Float);
  const float* a = static_cast<const float*>(activation.const_data_ptr());
  const float* w = static_cast<const float*>(weight.const_data_ptr());
  float* const out = data<float>(scale);
  for (int64_t i = 0; i < scale.numel(); ++i) {
    if (a[i] == 0.0f || w[i] == 0.0f) {
      out[i] = 1.0f;
      continue;
    }
    // In fp64 no fp32 input makes either power vanish or overflow.
    const double ratio = std::pow(static_cast<double>(a[i]), strength) /
                         std::pow(static_cast<double>(w[i]), 1.0 - strength);
    out[i] = static_cast<float>(
        std::min<double>(std::max(ratio, minimum), std::numeric_limits<float>::max()));
  }
  return scale;
}

}  // namespace qk::cpu

STABLE_TORCH_LIBRARY_IMPL(quantkit, CPU, m) {
  m.impl("smoothquant_scales", TORCH_BOX(&qk::cpu::smoothquant_scales));
}
