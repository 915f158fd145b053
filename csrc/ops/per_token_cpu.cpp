// int8_quant_per_token and fp8_quant_per_token on the CPU: the fused kernels of rtn, a row at a
// time.
#include <algorithm>

#include "cpu/rtn.h"
#include "cpu/scale.h"
#include "ops/token_rows.h"

namespace qk::cpu {
namespace {

using Shape = std::vector<int64_t>;

// f(row as a block row of its own, scratch) for every token.
template <typename Kernel>
void for_tokens(const Tensor& x, const Tokens& tokens, int8_t* q, float* scale, int8_t* zero_point,
                const Kernel& kernel) {
  const int64_t cols = tokens.cols;
  parallel_rows(tokens.rows, cols, [&](int64_t begin, int64_t end) {
    std::vector<char> scratch(rtn_scratch_bytes(cols));
    for (int64_t i = begin; i < end; ++i) {
      kernel(BlockRow{row(x, i), i + 1 < end ? row(x, i + 1) : nullptr, cols, 1, cols, cols,
                      q + i * cols, cols, scale + i, zero_point ? zero_point + i : nullptr},
             scratch.data());
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> int8_quant_per_token(const Tensor& x, bool symmetric) {
  constexpr auto kOp = "int8_quant_per_token";
  const Tokens tokens = check_tokens(kOp, x);
  Tensor q = output(x, tokens.shape, ScalarType::Char);
  Tensor scale = torch::stable::new_empty(x, tokens.scale_shape, ScalarType::Float);
  Tensor zero_point =
      torch::stable::new_empty(x, symmetric ? Shape{0} : tokens.scale_shape, ScalarType::Char);
  if (tokens.cols == 0) {  // a token without elements counts as zeros
    const std::vector<float> zeros(tokens.rows);
    if (symmetric) {
      scale_kernels().symmetric(zeros.data(), tokens.rows, 127.0f, DType::kFloat32,
                                data<float>(scale));
    } else {
      scale_kernels().asymmetric(zeros.data(), zeros.data(), tokens.rows, -128, 127,
                                 DType::kFloat32, data<float>(scale), data<int8_t>(zero_point));
    }
  }
  if (x.numel() == 0) return {q, scale, zero_point};
  const RtnInt how{symmetric ? -127 : -128, 127, symmetric, 127.0f, DType::kFloat32, 0};
  const DType dtype = dtype_of(kOp, x.scalar_type());
  for_tokens(
      x, tokens, data<int8_t>(q), data<float>(scale),
      symmetric ? nullptr : data<int8_t>(zero_point),
      [&](const BlockRow& row, void* scratch) { rtn_kernels().rtn_int(dtype, how, row, scratch); });
  return {q, scale, zero_point};
}

std::tuple<Tensor, Tensor> fp8_quant_per_token(const Tensor& x, ScalarType dtype) {
  constexpr auto kOp = "fp8_quant_per_token";
  const Tokens tokens = check_tokens(kOp, x);
  check_fp8_dtype(kOp, dtype);
  Tensor q = output(x, tokens.shape, dtype);
  Tensor scale = torch::stable::new_empty(x, tokens.scale_shape, ScalarType::Float);
  if (tokens.cols == 0) {
    const std::vector<float> zeros(tokens.rows);
    scale_kernels().symmetric(zeros.data(), tokens.rows, 448.0f, DType::kFloat32,
                              data<float>(scale));
  }
  if (x.numel() == 0) return {q, scale};
  const DType from = dtype_of(kOp, x.scalar_type()), to = dtype_of(kOp, dtype);
  for_tokens(
      x, tokens, data<int8_t>(q), data<float>(scale), nullptr,
      [&](const BlockRow& row, void* scratch) { rtn_kernels().rtn_fp8(from, to, row, scratch); });
  return {q, scale};
}

}  // namespace qk::cpu

STABLE_TORCH_LIBRARY_IMPL(quantkit, CPU, m) {
  m.impl("int8_quant_per_token", TORCH_BOX(&qk::cpu::int8_quant_per_token));
  m.impl("fp8_quant_per_token", TORCH_BOX(&qk::cpu::fp8_quant_per_token));
}
