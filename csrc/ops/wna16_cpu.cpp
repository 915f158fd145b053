// pack_wna16 and wna16_gemm on the CPU.
#include "ops/wna16.h"

#include "ops/pack_check.h"

namespace qk::cpu {
namespace {

using Optional = std::optional<Tensor>;

// Its numbers, checked; null if there is none.
const int32_t* check_perm(const char* op, const Optional& perm, int64_t cols) {
  if (!perm) return nullptr;
  check_perm_shape(op, *perm, cols);
  const auto* const order = reinterpret_cast<const int32_t*>(element(*perm, 0));
  uint32_t largest = 0;
  for (int64_t k = 0; k < cols; ++k) largest = std::max(largest, static_cast<uint32_t>(order[k]));
  if (largest < static_cast<uint64_t>(cols)) return order;
  const int32_t* const wrong =
      std::find_if(order, order + cols, [&](int32_t k) { return k < 0 || k >= cols; });
  check(false, op, "perm must hold columns 0 to ", cols - 1, ", got ", *wrong);
  return nullptr;
}

Wna16Weight check_weight(const char* op, const Tensor& x, const Tensor& packed, const Tensor& scale,
                         const Optional& zero_point, int64_t num_bits, int64_t out_features,
                         int64_t group_size) {
  const int64_t groups =
      check_wna16_weight(op, x, packed, scale, zero_point, num_bits, out_features, group_size);
  const int64_t cols = x.size(1);
  return {static_cast<int>(num_bits),
          reinterpret_cast<const int32_t*>(element(packed, 0)),
          out_features,
          cols,
          dtype_of(op, scale.scalar_type()),
          element(scale, 0),
          zero_point ? reinterpret_cast<const int8_t*>(element(*zero_point, 0)) : nullptr,
          cols / groups,
          groups,
          scale.dim() == 3};
}

}  // namespace

Tensor pack_wna16(const Tensor& words, int64_t num_bits, int64_t in_features,
                  const Optional& perm) {
  constexpr auto kOp = "pack_wna16";
  check_pack_wna16(kOp, words, num_bits, in_features, perm);
  const int bits = static_cast<int>(num_bits);
  const int64_t steps = wna16_steps(bits, in_features);
  const int32_t* const order = check_perm(kOp, perm, in_features);
  const int64_t rows = words.size(0), panels = (rows + kPanelCols - 1) / kPanelCols;
  Tensor packed = output(words, {panels, steps, kPanelCols}, ScalarType::Int);
  const Wna16Words in = {
      bits, reinterpret_cast<const int32_t*>(element(words, 0)), words.stride(0), rows, in_features,
      order};
  const Wna16Kernels& kernels = wna16_kernels();
  parallel_queue(panels, [&](int64_t p) {
    const std::unique_ptr<int32_t[]> room(new int32_t[16 * steps]);
    kernels.pack(in, p, room.get(), data<int32_t>(packed) + p * steps * kPanelCols);
  });
  return packed;
}

Tensor wna16_gemm(const Tensor& x, const Tensor& packed, const Tensor& weight_scale,
                  const Optional& weight_zero_point, const Optional& perm, const Optional& bias,
                  int64_t num_bits, int64_t out_features, int64_t group_size) {
  constexpr auto kOp = "wna16_gemm";
  const Wna16Weight weight = check_weight(kOp, x, packed, weight_scale, weight_zero_point, num_bits,
                                          out_features, group_size);
  const int32_t* const order = check_perm(kOp, perm, x.size(1));
  return wna16_product(kOp, x, weight, order, bias);
}

}  // namespace qk::cpu

STABLE_TORCH_LIBRARY_IMPL(quantkit, CPU, m) {
  m.impl("pack_wna16", TORCH_BOX(&qk::cpu::pack_wna16));
  m.impl("wna16_gemm", TORCH_BOX(&qk::cpu::wna16_gemm));
}
