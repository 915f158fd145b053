// What the int8 GEMMs share: how a product is spread over threads.
#pragma once

#include "cpu/w8a8.h"
#include "ops/cpu_ops.h"
#include "ops/gemm_check.h"

namespace qk::cpu {

// Columns of x that are multiplied as they are, and x there: fp32 [rows, count].
struct WideColumns {
  const int32_t* columns;
  const float* x;
  int64_t count;
};

// A whole product. `task` says what becomes of the sums: its out, scale and bias are those of row
// and column 0; `input.left_out` is filled in from `wide`.
struct Int8Product {
  Int8Input input;
  int64_t rows, out_features;
  const int8_t* packed;
  Int8Task task;
  WideColumns wide;
};

// x by the packed weight into `out`, of x's dtype; x quantized per token and symmetrically.
inline Int8Product scaled_product(DType dtype, const Tensor& x, const Tensor& packed,
                                  const Tensor& weight_scale, const std::optional<Tensor>& bias,
                                  const Tensor& out) {
  Int8Product product = {};
  product.input = {
      dtype, x.const_data_ptr(), x.stride(0), x.size(1), true, nullptr, nullptr, nullptr, 0};
  product.rows = x.size(0);
  product.out_features = out.size(1);
  product.packed = static_cast<const int8_t*>(packed.const_data_ptr());
  product.task.dtype = dtype;
  product.task.out = data<void>(out);
  product.task.stride = out.size(1);
  product.task.scale = static_cast<const float*>(weight_scale.const_data_ptr());
  product.task.one_scale = weight_scale.size(0) == 1;
  if (bias) {
    product.task.bias = bias->const_data_ptr();
    product.task.bias_dtype = bias->scalar_type() == ScalarType::Float ? DType::kFloat32 : dtype;
  }
  return product;
}

// `like` is any CPU tensor: scratch is allocated as torch does.
void int8_product(const Tensor& like, const Int8Product& product);

}  // namespace qk::cpu
