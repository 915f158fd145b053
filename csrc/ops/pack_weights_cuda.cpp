// pack_w8a8, pack_w4a8, pack_wna16, pack_fp8 and pack_bf16 on CUDA.
#include "cuda/common/pack_weights.h"

#include "ops/cuda_tensor.h"
#include "ops/pack_check.h"

namespace qk::cuda {
namespace ops {
namespace {

Tensor run(const char* op, const char* name, WeightLayout layout, const Tensor& weight,
           int64_t cols, const int32_t* perm, const Shape& shape, ScalarType dtype) {
  check(on_device(weight), op, name, " must be on a CUDA device");
  check_extent(op, name, weight.size(0), cols);
  const WeightSource source{weight.const_data_ptr(), weight.stride(0),
                            static_cast<int>(weight.size(0)), static_cast<int>(cols), perm};
  const auto guard = use_device_of(weight);
  const Tensor packed = new_tensor(weight, shape, dtype);
  check_launch(op, pack_weight(layout, source, packed.mutable_data_ptr(), current_stream(weight)));
  return packed;
}

// Four codes to a word, and one more word.
Shape byte_shape(const Tensor& codes) {
  return {gemm_panels(codes.size(0)), ((codes.size(1) + 3) / 4 + 1) * 4 * kGemmPanel};
}

Tensor pack_w8a8(const Tensor& codes) {
  constexpr auto kOp = "pack_w8a8";
  check_pack_w8a8(kOp, codes);
  return run(kOp, "codes", WeightLayout::kInt8, codes, codes.size(1), nullptr, byte_shape(codes),
             ScalarType::Char);
}

Tensor pack_fp8(const Tensor& codes) {
  constexpr auto kOp = "pack_fp8";
  check_pack_fp8(kOp, codes);
  return run(kOp, "codes", WeightLayout::kFloat8, codes, codes.size(1), nullptr, byte_shape(codes),
             ScalarType::Char);
}

Tensor pack_w4a8(const Tensor& words, int64_t in_features) {
  constexpr auto kOp = "pack_w4a8";
  check_pack_w4a8(kOp, words, in_features);
  return run(kOp, "words", WeightLayout::kInt4ByInt8, words, in_features, nullptr,
             {gemm_panels(words.size(0)), words.size(1), kGemmPanel}, ScalarType::Int);
}

Tensor pack_wna16(const Tensor& words, int64_t num_bits, int64_t in_features,
                  const OptionalTensor& perm) {
  constexpr auto kOp = "pack_wna16";
  check_pack_wna16(kOp, words, num_bits, in_features, perm);
  return run(kOp, "words", num_bits == 4 ? WeightLayout::kInt4 : WeightLayout::kByte, words,
             in_features, perm ? data_of<int32_t>(kOp, "perm", *perm) : nullptr,
             {gemm_panels(words.size(0)), words.size(1), kGemmPanel}, ScalarType::Int);
}

Tensor pack_bf16(const Tensor& weight) {
  constexpr auto kOp = "pack_bf16";
  check_pack_bf16(kOp, weight);
  return run(kOp, "weight", WeightLayout::kBFloat16, weight, weight.size(1), nullptr,
             {gemm_panels(weight.size(0)), (weight.size(1) + 1) / 2, kGemmPanel}, ScalarType::Int);
}

}  // namespace
}  // namespace ops
}  // namespace qk::cuda

QUANTKIT_CUDA_OPS(m) {
  m.impl("pack_w8a8", TORCH_BOX(&qk::cuda::ops::pack_w8a8));
  m.impl("pack_fp8", TORCH_BOX(&qk::cuda::ops::pack_fp8));
  m.impl("pack_w4a8", TORCH_BOX(&qk::cuda::ops::pack_w4a8));
  m.impl("pack_wna16", TORCH_BOX(&qk::cuda::ops::pack_wna16));
  m.impl("pack_bf16", TORCH_BOX(&qk::cuda::ops::pack_bf16));
}
