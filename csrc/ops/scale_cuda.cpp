// symmetric_scale and asymmetric_scale on CUDA.
#include <tuple>

#include "cuda/common/scale.h"
#include "ops/cuda_tensor.h"

namespace qk::cuda {
namespace ops {
namespace {

const float* floats(const char* op, const char* name, const Tensor& tensor) {
  check(tensor.scalar_type() == ScalarType::Float, op, name, " must be float32, got ",
        name_of(tensor.scalar_type()));
  return data_of<float>(op, name, tensor);
}

Tensor symmetric_scale(const Tensor& amax, double divisor, ScalarType scale_dtype) {
  constexpr auto kOp = "symmetric_scale";
  check_scale_dtype(kOp, scale_dtype);
  const DType dtype = dtype_of(kOp, scale_dtype);
  const float* source = floats(kOp, "amax", amax);
  const auto guard = use_device_of(amax);
  const Tensor scale = new_tensor(amax, shape_of(amax), ScalarType::Float);
  check_launch(kOp, make_symmetric_scale(source, amax.numel(), static_cast<float>(divisor), dtype,
                                         data<float>(scale), current_stream(amax)));
  return scale;
}

std::tuple<Tensor, Tensor> asymmetric_scale(const Tensor& x_min, const Tensor& x_max, int64_t q_min,
                                            int64_t q_max, ScalarType scale_dtype) {
  constexpr auto kOp = "asymmetric_scale";
  check_scale_dtype(kOp, scale_dtype);
  const DType dtype = dtype_of(kOp, scale_dtype);
  check_code_range(kOp, q_min, q_max);
  check(shape_of(x_min) == shape_of(x_max), kOp, "x_min ", text_of(x_min.sizes()), " and x_max ",
        text_of(x_max.sizes()), " must have one shape");
  check_same_device(kOp, "x_max", x_max, x_min);
  const float* low = floats(kOp, "x_min", x_min);
  const float* high = floats(kOp, "x_max", x_max);
  const auto guard = use_device_of(x_min);
  const Tensor scale = new_tensor(x_min, shape_of(x_min), ScalarType::Float);
  const Tensor zero_point = new_tensor(x_min, shape_of(x_min), ScalarType::Char);
  check_launch(kOp, make_asymmetric_scale(low, high, x_min.numel(), static_cast<int>(q_min),
                                          static_cast<int>(q_max), dtype, data<float>(scale),
                                          data<int8_t>(zero_point), current_stream(x_min)));
  return {scale, zero_point};
}

}  // namespace
}  // namespace ops
}  // namespace qk::cuda

QUANTKIT_CUDA_OPS(m) {
  m.impl("symmetric_scale", TORCH_BOX(&qk::cuda::ops::symmetric_scale));
  m.impl("asymmetric_scale", TORCH_BOX(&qk::cuda::ops::asymmetric_scale));
}
