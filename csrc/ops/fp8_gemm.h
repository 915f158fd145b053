// What fp8_gemm and its counterpart over experts share: the checks.
#pragma once

#include "cpu/fp8_gemm.h"
#include "ops/cpu_ops.h"

namespace qk::cpu {

// Arguments of fp8_gemm, checked. `tensor`: x gets one scale at run time, which is not made yet.
struct Fp8Arguments {
  Fp8Weight weight;
  Fp8Quantizer how;
  bool tensor;
};

Fp8Arguments check_fp8_gemm(const char* op, const Tensor& x, const Tensor& packed,
                            const Tensor& weight_scale, const Block& weight_block,
                            int64_t out_features, const std::optional<Tensor>& input_scale,
                            const std::optional<Block>& input_block,
                            const std::optional<Tensor>& bias);

// The one scale of x, as rtn_fp8 makes it.
Tensor fp8_tensor_scale(const Tensor& x);

}  // namespace qk::cpu
