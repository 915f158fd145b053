// symmetric_scale and asymmetric_scale on the CPU.
#include "cpu/scale.h"

#include "ops/cpu_ops.h"

namespace qk::cpu {
namespace {

void check_extremes(const char* op, const char* name, const Tensor& x) {
  check(x.scalar_type() == ScalarType::Float, op, name, " must be float32, got ",
        name_of(x.scalar_type()));
  check(x.is_contiguous(), op, name, " must be contiguous, got strides ", text_of(x.strides()));
}

}  // namespace

Tensor symmetric_scale(const Tensor& amax, double divisor, ScalarType scale_dtype) {
  check_extremes("symmetric_scale", "amax", amax);
  check_scale_dtype("symmetric_scale", scale_dtype);
  Tensor scale = torch::stable::new_empty(amax, amax.sizes());
  scale_kernels().symmetric(static_cast<const float*>(amax.const_data_ptr()), amax.numel(),
                            static_cast<float>(divisor), dtype_of("symmetric_scale", scale_dtype),
                            data<float>(scale));
  return scale;
}

std::tuple<Tensor, Tensor> asymmetric_scale(const Tensor& x_min, const Tensor& x_max, int64_t q_min,
                                            int64_t q_max, ScalarType scale_dtype) {
  constexpr auto kOp = "asymmetric_scale";
  check_extremes(kOp, "x_min", x_min);
  check_extremes(kOp, "x_max", x_max);
  check(text_of(x_min.sizes()) == text_of(x_max.sizes()), kOp, "x_max ", text_of(x_max.sizes()),
        " must have x_min's shape ", text_of(x_min.sizes()));
  check_code_range(kOp, q_min, q_max);
  check_scale_dtype(kOp, scale_dtype);
  Tensor scale = torch::stable::new_empty(x_min, x_min.sizes());
  Tensor zero_point = torch::stable::new_empty(x_min, x_min.sizes(), ScalarType::Char);
  scale_kernels().asymmetric(static_cast<const float*>(x_min.const_data_ptr()),
                             static_cast<const float*>(x_max.const_data_ptr()), x_min.numel(),
                             static_cast<int>(q_min), static_cast<int>(q_max),
                             dtype_of(kOp, scale_dtype), data<float>(scale),
                             data<int8_t>(zero_point));
  return {scale, zero_point};
}

}  // namespace qk::cpu

STABLE_TORCH_LIBRARY_IMPL(quantkit, CPU, m) {
  m.impl("symmetric_scale", TORCH_BOX(&qk::cpu::symmetric_scale));
  m.impl("asymmetric_scale", TORCH_BOX(&qk::cpu::asymmetric_scale));
}
