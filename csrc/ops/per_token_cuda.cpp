// int8_quant_per_token and fp8_quant_per_token on CUDA: round to nearest with one block a token.
#include <tuple>

#include "ops/rtn_cuda.h"

namespace qk::cuda {
namespace ops {
namespace {

// x [..., cols] as the matrix of its tokens, and what the ops give back for it.
struct Tokens {
  Matrix matrix;
  Blocks blocks;
  Shape shape, scale_shape;
};

Tokens tokens_of(const char* op, const Tensor& x) {
  check_float(op, "x", x);
  check(on_device(x), op, "x must be on a CUDA device");
  check(x.dim() >= 1, op, "x must have at least one dimension");
  const int64_t last = x.dim() - 1, cols = x.size(last);
  int64_t rows = 1, row_stride = 0;
  for (int64_t d = last - 1; d >= 0; --d) {
    if (x.size(d) != 1 && rows > 1) {
      check(x.numel() == 0 || x.stride(d) == rows * row_stride, op, "the dimensions of x ",
            text_of(x.sizes()),
            " before the last must be one evenly strided run of tokens, got strides ",
            text_of(x.strides()), "; call .contiguous() on it");
    } else if (x.size(d) != 1) {
      row_stride = x.stride(d);
    }
    rows *= x.size(d);
  }
  check_extent(op, "x", rows, cols);
  Shape scale_shape = shape_of(x);
  scale_shape.back() = 1;
  const int row_count = static_cast<int>(rows), col_count = static_cast<int>(cols);
  // One block for each token even if a token has no values: its scale is that of zeros.
  return {{x.const_data_ptr(), dtype_of(op, x.scalar_type()), row_count, col_count, row_stride,
           x.stride(last)},
          {1, col_count > 0 ? col_count : 1, row_count, 1},
          shape_of(x),
          scale_shape};
}

std::tuple<Tensor, Tensor, Tensor> int8_quant_per_token(const Tensor& x, bool symmetric) {
  constexpr auto kOp = "int8_quant_per_token";
  const Tokens tokens = tokens_of(kOp, x);
  const RtnArgs args{DType::kInt8, symmetric ? -127 : -128, 127, symmetric,
                     127.0f,       DType::kFloat32,         0};
  const auto guard = use_device_of(x);
  const Tensor codes = new_tensor(x, tokens.shape, ScalarType::Char);
  const Tensor scale = new_tensor(x, tokens.scale_shape, ScalarType::Float);
  const Tensor zero_point =
      new_tensor(x, symmetric ? Shape{0} : tokens.scale_shape, ScalarType::Char);
  round_to_nearest(kOp, tokens.matrix, tokens.blocks, args, x, codes, scale, zero_point);
  return {codes, scale, zero_point};
}

std::tuple<Tensor, Tensor> fp8_quant_per_token(const Tensor& x, ScalarType dtype) {
  constexpr auto kOp = "fp8_quant_per_token";
  const Tokens tokens = tokens_of(kOp, x);
  const RtnArgs args = fp8_args(kOp, dtype);
  const auto guard = use_device_of(x);
  const Tensor codes = new_tensor(x, tokens.shape, dtype);
  const Tensor scale = new_tensor(x, tokens.scale_shape, ScalarType::Float);
  round_to_nearest(kOp, tokens.matrix, tokens.blocks, args, x, codes, scale, scale);
  return {codes, scale};
}

}  // namespace
}  // namespace ops
}  // namespace qk::cuda

QUANTKIT_CUDA_OPS(m) {
  m.impl("int8_quant_per_token", TORCH_BOX(&qk::cuda::ops::int8_quant_per_token));
  m.impl("fp8_quant_per_token", TORCH_BOX(&qk::cuda::ops::fp8_quant_per_token));
}
