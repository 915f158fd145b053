// quantize_int, quantize_fp8 and dequantize on CUDA.
#include "cuda/common/quantize.h"

#include "ops/cuda_tensor.h"

namespace qk::cuda {
namespace ops {
namespace {

Tensor quantize_int(const Tensor& x, const Tensor& scale, const OptionalTensor& zero_point,
                    IntList block, int64_t q_min, int64_t q_max) {
  constexpr auto kOp = "quantize_int";
  const Matrix matrix = float_matrix(kOp, x);
  const Blocks blocks = blocks_of(kOp, x, check_scale(kOp, x, scale, zero_point, block));
  check_code_range(kOp, q_min, q_max);
  const QuantizeArgs args{blocks,
                          scale_data(scale),
                          zero_point_data(zero_point),
                          DType::kInt8,
                          static_cast<int>(q_min),
                          static_cast<int>(q_max),
                          0};
  const auto guard = use_device_of(x);
  const Tensor codes = new_tensor(x, {matrix.rows, matrix.cols}, ScalarType::Char);
  check_launch(kOp, quantize(matrix, args, codes.mutable_data_ptr(), current_stream(x)));
  return codes;
}

Tensor quantize_fp8(const Tensor& x, const Tensor& scale, IntList block, ScalarType dtype) {
  constexpr auto kOp = "quantize_fp8";
  const Matrix matrix = float_matrix(kOp, x);
  const Blocks blocks = blocks_of(kOp, x, check_scale(kOp, x, scale, std::nullopt, block));
  check_fp8_dtype(kOp, dtype);
  const QuantizeArgs args{blocks, scale_data(scale), nullptr, dtype_of(kOp, dtype), 0, 0, 0};
  const auto guard = use_device_of(x);
  const Tensor codes = new_tensor(x, {matrix.rows, matrix.cols}, dtype);
  check_launch(kOp, quantize(matrix, args, codes.mutable_data_ptr(), current_stream(x)));
  return codes;
}

Tensor dequantize(const Tensor& q, const Tensor& scale, const OptionalTensor& zero_point,
                  IntList block, ScalarType dtype) {
  constexpr auto kOp = "dequantize";
  check_quantized(kOp, "q", q);
  const Matrix matrix = matrix_of(kOp, "q", q);
  const Blocks blocks = blocks_of(kOp, q, check_scale(kOp, q, scale, zero_point, block));
  check(is_float(dtype), kOp, "dtype must be float32, float16 or bfloat16, got ", name_of(dtype));
  const auto guard = use_device_of(q);
  const Tensor values = new_tensor(q, {matrix.rows, matrix.cols}, dtype);
  check_launch(
      kOp, cuda::dequantize(matrix, blocks, scale_data(scale), zero_point_data(zero_point),
                            values.mutable_data_ptr(), dtype_of(kOp, dtype), current_stream(q)));
  return values;
}

}  // namespace
}  // namespace ops
}  // namespace qk::cuda

QUANTKIT_CUDA_OPS(m) {
  m.impl("quantize_int", TORCH_BOX(&qk::cuda::ops::quantize_int));
  m.impl("quantize_fp8", TORCH_BOX(&qk::cuda::ops::quantize_fp8));
  m.impl("dequantize", TORCH_BOX(&qk::cuda::ops::dequantize));
}
