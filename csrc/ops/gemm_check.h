// What the GEMMs check of their arguments, whichever kernel serves the call.
#pragma once

#include <algorithm>
#include <vector>

#include "ops/check.h"

namespace qk {

// Packed weights lie in panels of so many output channels.
constexpr int64_t kGemmPanel = 64;

inline int64_t gemm_panels(int64_t out_features) {
  return (out_features + kGemmPanel - 1) / kGemmPanel;
}

inline bool has_shape(const Tensor& x, std::initializer_list<int64_t> shape) {
  if (x.dim() != static_cast<int64_t>(shape.size())) return false;
  int64_t d = 0;
  for (const int64_t size : shape) {
    if (x.size(d++) != size) return false;
  }
  return true;
}

inline std::string text_of(std::initializer_list<int64_t> values) {
  return text_of(IntList(values.begin(), values.size()));
}

inline void check_w8a8_packed(const char* op, const Tensor& packed, int64_t out_features,
                              int64_t in_features) {
  check(out_features >= 0, op, "out_features must not be negative, got ", out_features);
  // The codes of 64 channels, four at a time, then the sums of the channels.
  const int64_t shape[] = {gemm_panels(out_features), ((in_features + 3) / 4 + 1) * 4 * kGemmPanel};
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

inline void check_bias(const char* op, const OptionalTensor& bias, const Tensor& x,
                       int64_t out_features) {
  if (!bias) return;
  check((bias->scalar_type() == ScalarType::Float || bias->scalar_type() == x.scalar_type()) &&
            bias->dim() == 1 && bias->size(0) == out_features,
        op, "bias must be torch.float32 or x's dtype [", out_features, "], got ",
        name_of(bias->scalar_type()), " ", text_of(bias->sizes()));
  check(bias->is_contiguous(), op, "bias must be contiguous, got strides ",
        text_of(bias->strides()));
}

inline void check_static_scale(const char* op, const Tensor& x, const OptionalTensor& input_scale,
                               const OptionalTensor& input_zero_point, bool symmetric) {
  // Sums of (code - zero point) * weight stay within int32.
  constexpr int64_t kMost = 0x7fffffff / (255 * 128);
  if (input_scale) {
    check(input_scale->scalar_type() == ScalarType::Float && input_scale->dim() == 1 &&
              input_scale->size(0) == 1,
          op, "input_scale must be torch.float32 [1], got ", name_of(input_scale->scalar_type()),
          " ", text_of(input_scale->sizes()));
  }
  if (input_zero_point) {
    check(input_zero_point->scalar_type() == ScalarType::Char && input_zero_point->dim() == 1 &&
              input_zero_point->size(0) == 1,
          op, "input_zero_point must be torch.int8 [1], got ",
          name_of(input_zero_point->scalar_type()), " ", text_of(input_zero_point->sizes()));
  }
  check(input_scale || !input_zero_point, op,
        "input_zero_point needs input_scale; without one, x is quantized per token");
  check(symmetric || !input_scale || input_zero_point, op,
        "symmetric=False with input_scale needs input_zero_point");
  check((symmetric && !input_zero_point) || x.size(1) <= kMost, op, "K must be at most ", kMost,
        " with asymmetric codes, or the int32 sums could overflow, got ", x.size(1));
}

inline void check_int8_gemm(const char* op, const Tensor& a, const Tensor& packed,
                            int64_t out_features) {
  check(a.dim() == 2 && a.scalar_type() == ScalarType::Char, op,
        "a must be torch.int8 [M, K], got ", name_of(a.scalar_type()), " ", text_of(a.sizes()));
  check_rows(op, "a", a);
  check_w8a8_packed(op, packed, out_features, a.size(1));
}

inline void check_w8a8_gemm(const char* op, const Tensor& x, const Tensor& packed,
                            const Tensor& weight_scale, int64_t out_features,
                            const OptionalTensor& input_scale,
                            const OptionalTensor& input_zero_point, bool symmetric,
                            const OptionalTensor& bias) {
  check_input(op, x);
  check_w8a8_packed(op, packed, out_features, x.size(1));
  check_weight_scale(op, weight_scale, out_features);
  check_bias(op, bias, x, out_features);
  check_static_scale(op, x, input_scale, input_zero_point, symmetric);
}

inline void check_int8_mixed_gemm(const char* op, const Tensor& x, const Tensor& packed,
                                  const Tensor& weight_scale, int64_t out_features,
                                  double threshold, const OptionalTensor& bias) {
  check_input(op, x);
  check_w8a8_packed(op, packed, out_features, x.size(1));
  check_weight_scale(op, weight_scale, out_features);
  check_bias(op, bias, x, out_features);
  check(threshold > 0, op, "threshold must be positive (inf: no outliers), got ", threshold);
}

inline void check_contiguous(const char* op, const char* name, const Tensor& x) {
  check(x.is_contiguous(), op, name, " must be contiguous, got strides ", text_of(x.strides()));
}

inline void check_w4a8_packed(const char* op, const Tensor& x, const Tensor& packed,
                              int64_t out_features) {
  check_input(op, x);
  const int64_t cols = x.size(1);
  check(out_features >= 0, op, "out_features must not be negative, got ", out_features);
  const int64_t shape[] = {gemm_panels(out_features), (cols + 7) / 8, kGemmPanel};
  check(
      packed.scalar_type() == ScalarType::Int && has_shape(packed, {shape[0], shape[1], shape[2]}),
      op, "packed must be what pack_w4a8 makes of ", out_features, " rows of ", cols,
      " codes, torch.int32 ", text_of({shape, 3}), ", got ", name_of(packed.scalar_type()), " ",
      text_of(packed.sizes()));
  check_contiguous(op, "packed", packed);
}

// Gives back the columns of a group.
inline int64_t check_w4a8_group(const char* op, int64_t cols, int64_t group_size) {
  check(group_size == -1 || (group_size > 0 && cols % group_size == 0 && group_size % 4 == 0), op,
        "group_size must be -1 (the whole row) or a multiple of 4 that divides K = ", cols,
        ", got ", group_size);
  // Sums of (code - zero point) * a stay within int32, for any zero point.
  constexpr int64_t kLongest = 0x7fffffff / ((7 + 128) * 127);
  const int64_t longest = group_size == -1 ? cols : group_size;
  check(longest <= kLongest, op, "a group must be at most ", kLongest,
        " columns, or the int32 sums could overflow, got ", longest);
  return longest;
}

inline void check_w4a8_scales(const char* op, const Tensor& scale, const OptionalTensor& zero_point,
                              int64_t out_features, int64_t groups) {
  const int64_t flat[] = {out_features, groups};
  const int64_t panels[] = {gemm_panels(out_features), groups, kGemmPanel};
  check_float(op, "weight_scale", scale);
  check(has_shape(scale, {flat[0], flat[1]}) || has_shape(scale, {panels[0], panels[1], panels[2]}),
        op, "weight_scale must be [N, G] = ", text_of({flat, 2}), " or pack_w4a8_scales of it, ",
        text_of({panels, 3}), ", got ", text_of(scale.sizes()));
  check_contiguous(op, "weight_scale", scale);
  if (!zero_point) return;
  const IntList sizes = scale.sizes();
  check(zero_point->scalar_type() == ScalarType::Char && zero_point->dim() == scale.dim() &&
            std::equal(sizes.begin(), sizes.end(), zero_point->sizes().begin()),
        op, "weight_zero_point must be torch.int8 of weight_scale's shape ", text_of(sizes),
        ", got ", name_of(zero_point->scalar_type()), " ", text_of(zero_point->sizes()));
  check_contiguous(op, "weight_zero_point", *zero_point);
}

inline int64_t check_w4a8_gemm(const char* op, const Tensor& x, const Tensor& packed,
                               const Tensor& weight_scale, int64_t out_features, int64_t group_size,
                               const OptionalTensor& weight_zero_point,
                               const OptionalTensor& bias) {
  check_w4a8_packed(op, x, packed, out_features);
  const int64_t cols = x.size(1), group = check_w4a8_group(op, cols, group_size);
  check_w4a8_scales(op, weight_scale, weight_zero_point, out_features, cols ? cols / group : 0);
  check_bias(op, bias, x, out_features);
  return group;
}

// What the GEMMs ask of x, whose columns are the weight's.
inline void check_product_input(const char* op, const Tensor& x, int64_t out_features) {
  check(x.dim() == 2, op, "x must be 2-D [tokens, in_features], got ", x.dim(), "-D");
  check_float(op, "x", x);
  check(x.size(1) <= 1 || x.stride(1) == 1, op,
        "x must have its last dimension contiguous, got strides ", text_of(x.strides()));
  check(x.size(1) > 0, op, "in_features must be positive, got ", x.size(1));
  check(out_features >= 0, op, "out_features must not be negative, got ", out_features);
}

inline void check_plain_bias(const char* op, const OptionalTensor& bias, const Tensor& x,
                             int64_t out_features) {
  if (!bias) return;
  const ScalarType dtype = bias->scalar_type();
  check((dtype == x.scalar_type() || dtype == ScalarType::Float) && bias->dim() == 1 &&
            bias->size(0) == out_features && bias->is_contiguous(),
        op, "bias must be contiguous ", name_of(x.scalar_type()), " or torch.float32 [",
        out_features, "], got ", name_of(dtype), " ", text_of(bias->sizes()));
}

inline void check_num_bits(const char* op, int64_t num_bits) {
  check(num_bits == 4 || num_bits == 8, op, "num_bits must be 4 or 8, got ", num_bits);
}

inline void check_perm_shape(const char* op, const Tensor& perm, int64_t cols) {
  check(perm.dim() == 1 && perm.size(0) == cols && perm.scalar_type() == ScalarType::Int, op,
        "perm must be torch.int32 [", cols, "], got ", name_of(perm.scalar_type()), " ",
        text_of(perm.sizes()));
  check(perm.is_contiguous(), op, "perm must be contiguous, got strides ", text_of(perm.strides()));
}

inline void check_wna16_packed(const char* op, const Tensor& x, const Tensor& packed,
                               int64_t num_bits, int64_t out_features) {
  check_product_input(op, x, out_features);
  check_num_bits(op, num_bits);
  const int64_t cols = x.size(1);
  const int64_t shape[] = {gemm_panels(out_features), (cols * num_bits + 31) / 32, kGemmPanel};
  check(packed.scalar_type() == ScalarType::Int && packed.dim() == 3 &&
            packed.size(0) == shape[0] && packed.size(1) == shape[1] &&
            packed.size(2) == shape[2] && packed.is_contiguous(),
        op, "packed must be what pack_wna16 makes of ", num_bits, " bits [", out_features, ", ",
        cols, "]: contiguous torch.int32 ", text_of({shape, 3}), ", got ",
        name_of(packed.scalar_type()), " ", text_of(packed.sizes()));
}

// Gives back the number of groups.
inline int64_t check_wna16_weight(const char* op, const Tensor& x, const Tensor& packed,
                                  const Tensor& scale, const OptionalTensor& zero_point,
                                  int64_t num_bits, int64_t out_features, int64_t group_size) {
  check_wna16_packed(op, x, packed, num_bits, out_features);
  const int64_t cols = x.size(1);
  check(group_size == -1 || (group_size > 0 && cols % group_size == 0), op,
        "group_size must be -1 or divide in_features ", cols, ", got ", group_size);
  const int64_t groups = group_size == -1 ? 1 : cols / group_size;
  check_float(op, "weight_scale", scale);
  const int64_t panels = gemm_panels(out_features);
  check((has_shape(scale, {out_features, groups}) ||
         has_shape(scale, {panels, groups, kGemmPanel})) &&
            scale.is_contiguous(),
        op, "weight_scale must be contiguous [", out_features, ", ", groups, "] for group_size ",
        group_size, ", or pack_wna16_scales of it, ", text_of({panels, groups, kGemmPanel}),
        ", got ", text_of(scale.sizes()));
  if (zero_point) {
    const IntList sizes = scale.sizes();
    check(zero_point->scalar_type() == ScalarType::Char && zero_point->dim() == scale.dim() &&
              std::equal(sizes.begin(), sizes.end(), zero_point->sizes().begin()) &&
              zero_point->is_contiguous(),
          op, "weight_zero_point must be contiguous torch.int8 ", text_of(sizes), ", got ",
          name_of(zero_point->scalar_type()), " ", text_of(zero_point->sizes()));
  }
  return groups;
}

inline void check_bf16_gemm(const char* op, const Tensor& x, const Tensor& packed,
                            int64_t out_features) {
  check_product_input(op, x, out_features);
  const int64_t cols = x.size(1);
  const int64_t shape[] = {gemm_panels(out_features), (cols + 1) / 2, kGemmPanel};
  check(packed.scalar_type() == ScalarType::Int && packed.dim() == 3 &&
            packed.size(0) == shape[0] && packed.size(1) == shape[1] &&
            packed.size(2) == shape[2] && packed.is_contiguous(),
        op, "packed must be what pack_bf16 makes of [", out_features, ", ", cols,
        "]: contiguous torch.int32 ", text_of({shape, 3}), ", got ", name_of(packed.scalar_type()),
        " ", text_of(packed.sizes()));
}

inline void check_fp8_input(const char* op, const Tensor& x, const OptionalTensor& scale,
                            const std::optional<std::vector<int64_t>>& block) {
  check(x.dim() == 2, op, "x must be 2-D [M, K], got ", x.dim(), "-D");
  check_float(op, "x", x);
  check_rows(op, "x", x);
  if (block) {
    const bool two = block->size() == 2;
    check(two && (((*block)[1] == -1 && ((*block)[0] == -1 || (*block)[0] == 1)) ||
                  ((*block)[0] == 1 && (*block)[1] > 0)),
          op,
          "input_block must be [-1, -1] (tensor), [1, -1] (token) or [1, columns of a group], got ",
          text_of({block->data(), block->size()}));
  }
  if (scale) {
    check(scale->scalar_type() == ScalarType::Float && scale->dim() == 1 && scale->size(0) == 1, op,
          "input_scale must be torch.float32 [1], got ", name_of(scale->scalar_type()), " ",
          text_of(scale->sizes()));
    check(!block || (*block)[0] == -1, op,
          "input_scale is one for the tensor: input_block must be [-1, -1] or None, got ",
          block ? text_of({block->data(), block->size()}) : "");
  }
}

inline void check_fp8_packed(const char* op, const Tensor& packed, int64_t out_features,
                             int64_t cols) {
  check(out_features >= 0, op, "out_features must not be negative, got ", out_features);
  const int64_t shape[] = {gemm_panels(out_features), ((cols + 3) / 4 + 1) * 4 * kGemmPanel};
  check(packed.scalar_type() == ScalarType::Char && packed.dim() == 2 &&
            packed.size(0) == shape[0] && packed.size(1) == shape[1] && packed.is_contiguous(),
        op, "packed must be what pack_fp8 makes of torch.float8_e4m3fn [", out_features, ", ", cols,
        "]: contiguous torch.int8 ", text_of({shape, 2}), ", got ", name_of(packed.scalar_type()),
        " ", text_of(packed.sizes()));
}

// Rows and columns that share a scale, and how many such blocks lie along K.
struct Fp8Grid {
  int64_t rows, columns, groups;
};

inline Fp8Grid check_fp8_arguments(const char* op, const Tensor& x, const Tensor& packed,
                                   const Tensor& weight_scale,
                                   const std::vector<int64_t>& weight_block, int64_t out_features,
                                   const OptionalTensor& input_scale,
                                   const std::optional<std::vector<int64_t>>& input_block,
                                   const OptionalTensor& bias) {
  check_fp8_input(op, x, input_scale, input_block);
  const int64_t cols = x.size(1);
  check_fp8_packed(op, packed, out_features, cols);
  const auto good = [](int64_t size) { return size == -1 || size > 0; };
  check(weight_block.size() == 2 && good(weight_block[0]) && good(weight_block[1]), op,
        "weight_block must be [rows, cols], positive or -1 for the whole extent, got ",
        text_of({weight_block.data(), weight_block.size()}));
  const auto size_of = [](int64_t size, int64_t extent) {
    return std::max<int64_t>(1, size == -1 ? extent : size);
  };
  const int64_t rows = size_of(weight_block[0], out_features),
                columns = size_of(weight_block[1], cols);
  const int64_t shape[] = {(out_features + rows - 1) / rows, (cols + columns - 1) / columns};
  check(weight_scale.scalar_type() == ScalarType::Float && weight_scale.dim() == 2 &&
            weight_scale.size(0) == shape[0] && weight_scale.size(1) == shape[1] &&
            weight_scale.is_contiguous(),
        op, "weight_scale must be contiguous torch.float32 ", text_of({shape, 2}),
        " for the weight [", out_features, ", ", cols, "] and weight_block ",
        text_of({weight_block.data(), weight_block.size()}), ", got ",
        name_of(weight_scale.scalar_type()), " ", text_of(weight_scale.sizes()));
  if (bias) {
    const ScalarType dtype = bias->scalar_type();
    check((dtype == ScalarType::Float || dtype == x.scalar_type()) && bias->dim() == 1 &&
              bias->size(0) == out_features && bias->is_contiguous(),
          op, "bias must be contiguous torch.float32 or x's dtype [", out_features, "], got ",
          name_of(dtype), " ", text_of(bias->sizes()));
  }
  return {rows, columns, shape[1]};
}

}  // namespace qk
