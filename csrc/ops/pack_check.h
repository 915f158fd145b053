// What the ops that lay weights out for the GEMMs check, and those on FP4 codes, whichever kernel
// serves the call; the words are those of python/quantkit/ops.
#pragma once

#include "ops/gemm_check.h"

namespace qk {

inline void check_pack_w8a8(const char* op, const Tensor& codes) {
  constexpr int64_t kLongest = 0x7fffffff / (128 * 128);
  check(codes.dim() == 2 && codes.scalar_type() == ScalarType::Char, op,
        "codes must be torch.int8 [N, K], got ", name_of(codes.scalar_type()), " ",
        text_of(codes.sizes()));
  check(codes.size(1) <= kLongest, op, "K must be at most ", kLongest,
        ", or the int32 sums could overflow, got ", codes.size(1));
  check_rows(op, "codes", codes);
}

inline void check_pack_w4a8(const char* op, const Tensor& words, int64_t in_features) {
  check(words.dim() == 2 && words.scalar_type() == ScalarType::Int, op,
        "words must be torch.int32 [N, ceil(K / 8)], got ", name_of(words.scalar_type()), " ",
        text_of(words.sizes()));
  check(words.size(1) == (in_features + 7) / 8, op, "in_features ", in_features, " takes ",
        (in_features + 7) / 8, " words a row, words has ", words.size(1));
  check_rows(op, "words", words);
}

// All but the numbers in `perm`.
inline void check_pack_wna16(const char* op, const Tensor& words, int64_t num_bits,
                             int64_t in_features, const OptionalTensor& perm) {
  check_num_bits(op, num_bits);
  check(in_features > 0, op, "in_features must be positive, got ", in_features);
  const int64_t steps = (in_features * num_bits + 31) / 32;
  check(words.dim() == 2 && words.scalar_type() == ScalarType::Int && words.size(1) == steps, op,
        "words must be torch.int32 [N, ", steps, "] for ", in_features, " codes of ", num_bits,
        " bits, got ", name_of(words.scalar_type()), " ", text_of(words.sizes()));
  check_rows(op, "words", words);
  if (!perm) return;
  check_perm_shape(op, *perm, in_features);
  check_same_device(op, "perm", *perm, words, "words");
}

inline void check_pack_fp8(const char* op, const Tensor& codes) {
  check(codes.dim() == 2 && codes.scalar_type() == ScalarType::Float8_e4m3fn, op,
        "codes must be torch.float8_e4m3fn [N, K], got ", name_of(codes.scalar_type()), " ",
        text_of(codes.sizes()));
  check_rows(op, "codes", codes);
}

inline void check_pack_bf16(const char* op, const Tensor& weight) {
  check(weight.dim() == 2 && weight.scalar_type() == ScalarType::BFloat16, op,
        "weight must be 2-D torch.bfloat16, got ", weight.dim(), "-D ",
        name_of(weight.scalar_type()));
  const int64_t cols = weight.size(1);
  check(cols > 0, op, "in_features must be positive, got ", cols);
  check(cols == 1 || weight.stride(1) == 1, op,
        "weight must have its last dimension contiguous, got strides ", text_of(weight.strides()));
}

inline Grid check_quantize_fp4(const char* op, const Tensor& x, const Tensor& scale,
                               int64_t group_size) {
  check(group_size > 0 && group_size % 2 == 0, op, "group_size must be positive and even, got ",
        group_size);
  const int64_t block[] = {1, group_size};
  const Grid grid = check_scale(op, x, scale, std::nullopt, {block, 2});
  check_float(op, "x", x);
  check(x.size(1) % 2 == 0, op, "x must have an even number of columns, got ", x.size(1));
  return grid;
}

inline void check_unpack_fp4(const char* op, const Tensor& packed) {
  check(packed.dim() == 2 && packed.scalar_type() == ScalarType::Byte, op,
        "packed must be 2-D torch.uint8, got ", packed.dim(), "-D ", name_of(packed.scalar_type()));
  check_rows(op, "packed", packed);
}

}  // namespace qk
