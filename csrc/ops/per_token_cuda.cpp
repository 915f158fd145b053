// int8_quant_per_token and fp8_quant_per_token on CUDA: round to nearest with one block a token.
#include <tuple>

#include "ops/rtn_cuda.h"
#include "ops/tokens_cuda.h"

namespace qk::cuda {
namespace ops {
namespace {

// One block for each token even if a token has no values: its scale is that of zeros.
Blocks blocks_of_tokens(const Matrix& x) { return {1, x.cols > 0 ? x.cols : 1, x.rows, 1}; }

std::tuple<Tensor, Tensor, Tensor> int8_quant_per_token(const Tensor& x, bool symmetric) {
  constexpr auto kOp = "int8_quant_per_token";
  const Tokens tokens = tokens_of(kOp, "x", x);
  const RtnArgs args{DType::kInt8, symmetric ? -127 : -128, 127, symmetric,
                     127.0f,       DType::kFloat32,         0};
  const auto guard = use_device_of(x);
  const Tensor codes = new_tensor(x, tokens.shape, ScalarType::Char);
  const Tensor scale = new_tensor(x, tokens.scale_shape, ScalarType::Float);
  const Tensor zero_point =
      new_tensor(x, symmetric ? Shape{0} : tokens.scale_shape, ScalarType::Char);
  round_to_nearest(kOp, tokens.matrix, blocks_of_tokens(tokens.matrix), args, x, codes, scale,
                   zero_point);
  return {codes, scale, zero_point};
}

std::tuple<Tensor, Tensor> fp8_quant_per_token(const Tensor& x, ScalarType dtype) {
  constexpr auto kOp = "fp8_quant_per_token";
  const Tokens tokens = tokens_of(kOp, "x", x);
  const RtnArgs args = fp8_args(kOp, dtype);
  const auto guard = use_device_of(x);
  const Tensor codes = new_tensor(x, tokens.shape, dtype);
  const Tensor scale = new_tensor(x, tokens.scale_shape, ScalarType::Float);
  round_to_nearest(kOp, tokens.matrix, blocks_of_tokens(tokens.matrix), args, x, codes, scale,
                   scale);
  return {codes, scale};
}

}  // namespace
}  // namespace ops
}  // namespace qk::cuda

QUANTKIT_CUDA_OPS(m) {
  m.impl("int8_quant_per_token", TORCH_BOX(&qk::cuda::ops::int8_quant_per_token));
  m.impl("fp8_quant_per_token", TORCH_BOX(&qk::cuda::ops::fp8_quant_per_token));
}
