// What the int8 GEMMs share: their checks, and how a product is spread over threads.
#pragma once

#include "cpu/w8a8.h"
#include "ops/cpu_ops.h"

namespace qk::cpu {

inline void check_w8a8_packed(const char* op, const Tensor& packed, int64_t out_features,
                              int64_t in_features) {
  check(out_features >= 0, op, "out_features must not be negative, got ", out_features);
  const int64_t shape[] = {(out_features + kPanel - 1) / kPanel, w8a8_panel_bytes(in_features)};
  check(packed.scalar_type() == ScalarType::Char && packed.dim() == 2 &&
            packed.size(0) == shape[0] && packed.size(1) == shape[1],
        op, "packed must be what pack_w8a8 makes of int8 [", out_features, ", ", in_features,
        "], torch.int8 ", text_of({shape, 2}), ", got ", name_of(packed.scalar_type()), " ",
        text_of(packed.sizes()));
  check(packed.is_contiguous(), op, "packed must be contiguous, got strides ",
        text_of(packed.strides()));
}

inline void check_input(const char* op, const Tensor& x) {
  check(x.dim() == 2, op, "x must be 2-D [M, K], got ", x.dim(), "-D");
  check_float(op, "x", x);
  check_rows(op, "x", x);
}

inline void check_weight_scale(const char* op, const Tensor& weight_scale, int64_t out_features) {
  check(weight_scale.scalar_type() == ScalarType::Float && weight_scale.dim() == 1 &&
            (weight_scale.size(0) == out_features || weight_scale.size(0) == 1),
        op, "weight_scale must be torch.float32 [", out_features, "] or [1], got ",
        name_of(weight_scale.scalar_type()), " ", text_of(weight_scale.sizes()));
  check(weight_scale.is_contiguous(), op, "weight_scale must be contiguous, got strides ",
        text_of(weight_scale.strides()));
}

inline void check_bias(const char* op, const std::optional<Tensor>& bias, const Tensor& x,
                       int64_t out_features) {
  if (!bias) return;
  check((bias->scalar_type() == ScalarType::Float || bias->scalar_type() == x.scalar_type()) &&
            bias->dim() == 1 && bias->size(0) == out_features,
        op, "bias must be torch.float32 or x's dtype [", out_features, "], got ",
        name_of(bias->scalar_type()), " ", text_of(bias->sizes()));
  check(bias->is_contiguous(), op, "bias must be contiguous, got strides ",
        text_of(bias->strides()));
}

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
