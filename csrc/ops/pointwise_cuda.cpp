// rms_norm, silu_mul, both with quantization per token behind them, and rotary_embedding on CUDA.
#include "cuda/common/pointwise.h"

#include <tuple>

#include "ops/pointwise_check.h"
#include "ops/tokens_cuda.h"

namespace qk::cuda {
namespace ops {
namespace {

struct Codes {
  Tensor codes, scale;
  RowOutput rows;
};

Codes new_codes(const char* op, const Tensor& x, const Tokens& tokens, ScalarType dtype) {
  check_codes(op, x, dtype);
  const Tensor codes = new_tensor(x, tokens.shape, dtype);
  const Tensor scale = new_tensor(x, tokens.scale_shape, ScalarType::Float);
  return {codes, scale, {nullptr, dtype_of(op, dtype), data<uint8_t>(codes), data<float>(scale)}};
}

struct Arguments {
  Tokens x;
  Matrix residual;
  Tensor sum;
  const void* weight;
};

Arguments check_norm(const char* op, const Tensor& x, const OptionalTensor& residual,
                     const Tensor& weight, double epsilon) {
  const Tokens tokens = tokens_of(op, "x", x);
  check_norm_weight(op, x, residual, weight, epsilon);
  Matrix other{};
  if (residual) other = tokens_of(op, "residual", *residual).matrix;
  return {tokens, other, new_tensor(x, residual ? tokens.shape : Shape{0}, x.scalar_type()),
          data_of<char>(op, "weight", weight)};
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const OptionalTensor& residual,
                                    const Tensor& weight, double epsilon) {
  constexpr auto kOp = "rms_norm";
  const auto guard = use_device_of(x);
  const Arguments args = check_norm(kOp, x, residual, weight, epsilon);
  const Tensor out = new_tensor(x, args.x.shape, x.scalar_type());
  check_launch(
      kOp, cuda::rms_norm(args.x.matrix, args.residual, args.weight, static_cast<float>(epsilon),
                          data<char>(args.sum), {data<char>(out), DType::kInt8, nullptr, nullptr},
                          current_stream(x)));
  return {out, args.sum};
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_quant(const Tensor& x, const OptionalTensor& residual,
                                                  const Tensor& weight, double epsilon,
                                                  ScalarType dtype) {
  constexpr auto kOp = "rms_norm_quant";
  const auto guard = use_device_of(x);
  const Arguments args = check_norm(kOp, x, residual, weight, epsilon);
  const Codes out = new_codes(kOp, x, args.x, dtype);
  check_launch(
      kOp, cuda::rms_norm(args.x.matrix, args.residual, args.weight, static_cast<float>(epsilon),
                          data<char>(args.sum), out.rows, current_stream(x)));
  return {out.codes, out.scale, args.sum};
}

Tensor silu_mul(const Tensor& gate, const Tensor& up) {
  constexpr auto kOp = "silu_mul";
  const auto guard = use_device_of(gate);
  const Tokens tokens = tokens_of(kOp, "gate", gate);
  check_like(kOp, "up", up, "gate", gate);
  const Tensor out = new_tensor(gate, tokens.shape, gate.scalar_type());
  check_launch(
      kOp, cuda::silu_mul(tokens.matrix, tokens_of(kOp, "up", up).matrix,
                          {data<char>(out), DType::kInt8, nullptr, nullptr}, current_stream(gate)));
  return out;
}

std::tuple<Tensor, Tensor> silu_mul_quant(const Tensor& gate, const Tensor& up, ScalarType dtype) {
  constexpr auto kOp = "silu_mul_quant";
  const auto guard = use_device_of(gate);
  const Tokens tokens = tokens_of(kOp, "gate", gate);
  check_like(kOp, "up", up, "gate", gate);
  const Codes out = new_codes(kOp, gate, tokens, dtype);
  check_launch(kOp, cuda::silu_mul(tokens.matrix, tokens_of(kOp, "up", up).matrix, out.rows,
                                   current_stream(gate)));
  return {out.codes, out.scale};
}

Tensor rotary_embedding(const Tensor& x, const Tensor& cosine, const Tensor& sine) {
  constexpr auto kOp = "rotary_embedding";
  check_rotary(kOp, x, cosine, sine);
  check(on_device(x), kOp, "x must be on a CUDA device");
  check_extent(kOp, "x", x.size(0) * x.size(1) * x.size(2), x.size(3));
  const auto guard = use_device_of(x);
  const int batch = static_cast<int>(x.size(0)), heads = static_cast<int>(x.size(1));
  const int tokens = static_cast<int>(x.size(2)), size = static_cast<int>(x.size(3));
  const Tensor out = new_tensor(x, {batch, tokens, heads, size}, x.scalar_type());
  const auto batch_stride = [&](const Tensor& y) { return y.size(0) == 1 ? 0 : y.stride(0); };
  check_launch(kOp, cuda::rotary_embedding({x.const_data_ptr(),
                                            dtype_of(kOp, x.scalar_type()),
                                            batch,
                                            heads,
                                            tokens,
                                            size,
                                            {x.stride(0), x.stride(1), x.stride(2)}},
                                           {cosine.const_data_ptr(),
                                            sine.const_data_ptr(),
                                            static_cast<int>(cosine.size(2) / 2),
                                            {batch_stride(cosine), cosine.stride(1)},
                                            {batch_stride(sine), sine.stride(1)}},
                                           data<char>(out), current_stream(x)));
  return torch::stable::transpose(out, 1, 2);
}

}  // namespace
}  // namespace ops
}  // namespace qk::cuda

QUANTKIT_CUDA_OPS(m) {
  m.impl("rms_norm", TORCH_BOX(&qk::cuda::ops::rms_norm));
  m.impl("rms_norm_quant", TORCH_BOX(&qk::cuda::ops::rms_norm_quant));
  m.impl("silu_mul", TORCH_BOX(&qk::cuda::ops::silu_mul));
  m.impl("silu_mul_quant", TORCH_BOX(&qk::cuda::ops::silu_mul_quant));
  m.impl("rotary_embedding", TORCH_BOX(&qk::cuda::ops::rotary_embedding));
}
