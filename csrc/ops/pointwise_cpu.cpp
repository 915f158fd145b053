// rms_norm, silu_mul, both with quantization per token behind them, and rotary_embedding on the
// CPU.
#include "cpu/pointwise.h"

#include "cpu/rtn.h"
#include "cpu/scale.h"
#include "ops/pointwise_check.h"
#include "ops/token_rows.h"

namespace qk::cpu {
namespace {

// ---- codes of a row, as int8_quant_per_token and fp8_quant_per_token make them ----
struct Codes {
  Tensor codes, scale;
};

Codes empty_codes(const char* op, const Tensor& x, const Tokens& tokens, ScalarType dtype) {
  check_codes(op, x, dtype);
  return {output(x, tokens.shape, dtype),
          torch::stable::new_empty(x, tokens.scale_shape, ScalarType::Float)};
}

// f(i, where row i goes to, in x's dtype), and that row's codes.
template <typename Row>
void quantize_rows(const char* op, const Tensor& x, const Tokens& tokens, const Codes& out,
                   const Row& f) {
  const int64_t cols = tokens.cols;
  const DType from = dtype_of(op, x.scalar_type()), to = dtype_of(op, out.codes.scalar_type());
  const RtnInt how{-127, 127, true, 127.0f, DType::kFloat32, 0};
  parallel_rows(tokens.rows, cols, [&](int64_t begin, int64_t end) {
    std::vector<char> scratch(rtn_scratch_bytes(cols)), values(4 * cols);
    for (int64_t i = begin; i < end; ++i) {
      f(i, values.data());
      const BlockRow block{values.data(),
                           nullptr,
                           cols,
                           1,
                           cols,
                           cols,
                           data<int8_t>(out.codes) + i * cols,
                           cols,
                           data<float>(out.scale) + i,
                           nullptr};
      if (to == DType::kInt8) {
        rtn_kernels().rtn_int(from, how, block, scratch.data());
      } else {
        rtn_kernels().rtn_fp8(from, to, block, scratch.data());
      }
    }
  });
}

// ---- the arguments of a norm ----
struct Norm {
  Tokens tokens;
  const Tensor &x, &weight;
  const OptionalTensor& residual;
  Tensor sum;
  float epsilon;
  DType dtype;

  void operator()(int64_t i, void* out) const {
    void* const to = residual ? data<char>(sum) + i * tokens.cols * sum.element_size() : nullptr;
    pointwise_kernels().rms_norm(dtype, row(x, i), residual ? row(*residual, i) : nullptr,
                                 weight.const_data_ptr(), tokens.cols, epsilon, to, out);
  }
};

Norm check_norm(const char* op, const Tensor& x, const OptionalTensor& residual,
                const Tensor& weight, double epsilon) {
  const Tokens tokens = check_tokens(op, x);
  check_norm_weight(op, x, residual, weight, epsilon);
  if (residual) check_rows(op, "residual", *residual);
  Tensor sum = residual ? output(x, tokens.shape, x.scalar_type())
                        : torch::stable::new_empty(x, std::vector<int64_t>{0}, x.scalar_type());
  return {
      tokens, x, weight, residual, sum, static_cast<float>(epsilon), dtype_of(op, x.scalar_type())};
}

struct Gate {
  const Tensor &gate, &up;
  int64_t cols;
  DType dtype;

  void operator()(int64_t i, void* out) const {
    pointwise_kernels().silu_mul(dtype, row(gate, i), row(up, i), cols, out);
  }
};

}  // namespace

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const OptionalTensor& residual,
                                    const Tensor& weight, double epsilon) {
  const Norm norm = check_norm("rms_norm", x, residual, weight, epsilon);
  const int64_t cols = norm.tokens.cols, size = x.element_size();
  Tensor out = output(x, norm.tokens.shape, x.scalar_type());
  if (x.numel() == 0) return {out, norm.sum};
  parallel_rows(norm.tokens.rows, cols, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) norm(i, data<char>(out) + i * cols * size);
  });
  return {out, norm.sum};
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_quant(const Tensor& x, const OptionalTensor& residual,
                                                  const Tensor& weight, double epsilon,
                                                  ScalarType dtype) {
  constexpr auto kOp = "rms_norm_quant";
  const Norm norm = check_norm(kOp, x, residual, weight, epsilon);
  const Codes out = empty_codes(kOp, x, norm.tokens, dtype);
  if (x.numel() != 0) quantize_rows(kOp, x, norm.tokens, out, norm);
  return {out.codes, out.scale, norm.sum};
}

Tensor silu_mul(const Tensor& gate, const Tensor& up) {
  constexpr auto kOp = "silu_mul";
  const Tokens tokens = check_tokens(kOp, gate, "gate");
  check_like(kOp, "up", up, "gate", gate);
  check_rows(kOp, "up", up);
  Tensor out = output(gate, tokens.shape, gate.scalar_type());
  if (gate.numel() == 0) return out;
  const Gate row_of{gate, up, tokens.cols, dtype_of(kOp, gate.scalar_type())};
  const int64_t bytes = tokens.cols * gate.element_size();
  parallel_rows(tokens.rows, tokens.cols, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) row_of(i, data<char>(out) + i * bytes);
  });
  return out;
}

std::tuple<Tensor, Tensor> silu_mul_quant(const Tensor& gate, const Tensor& up, ScalarType dtype) {
  constexpr auto kOp = "silu_mul_quant";
  const Tokens tokens = check_tokens(kOp, gate, "gate");
  check_like(kOp, "up", up, "gate", gate);
  check_rows(kOp, "up", up);
  const Codes out = empty_codes(kOp, gate, tokens, dtype);
  if (gate.numel() != 0) {
    const Gate row_of{gate, up, tokens.cols, dtype_of(kOp, gate.scalar_type())};
    quantize_rows(kOp, gate, tokens, out, row_of);
  }
  return {out.codes, out.scale};
}

Tensor rotary_embedding(const Tensor& x, const Tensor& cosine, const Tensor& sine) {
  constexpr auto kOp = "rotary_embedding";
  check_rotary(kOp, x, cosine, sine);
  // In the order tokens, heads, so that it is a view of [batch, tokens, heads, size] as x is.
  const int64_t heads = x.size(1), tokens = x.size(2), size = x.size(3), bytes = x.element_size();
  Tensor out = output(x, {x.size(0), tokens, heads, size}, x.scalar_type());
  if (x.numel() != 0) {
    const DType dtype = dtype_of(kOp, x.scalar_type());
    parallel_rows(x.size(0) * tokens, heads * size, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / tokens, t = i % tokens;
        const int64_t angle = cosine.size(0) == 1 ? t : i;
        for (int64_t h = 0; h < heads; ++h) {
          pointwise_kernels().rotate(
              dtype, element(x, b * x.stride(0) + h * x.stride(1) + t * x.stride(2)),
              row(cosine, angle), row(sine, angle), cosine.size(2) / 2, size,
              data<char>(out) + (i * heads + h) * size * bytes);
        }
      }
    });
  }
  return torch::stable::transpose(out, 1, 2);
}

}  // namespace qk::cpu

STABLE_TORCH_LIBRARY_IMPL(quantkit, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&qk::cpu::rms_norm));
  m.impl("rms_norm_quant", TORCH_BOX(&qk::cpu::rms_norm_quant));
  m.impl("silu_mul", TORCH_BOX(&qk::cpu::silu_mul));
  m.impl("silu_mul_quant", TORCH_BOX(&qk::cpu::silu_mul_quant));
  m.impl("rotary_embedding", TORCH_BOX(&qk::cpu::rotary_embedding));
}
