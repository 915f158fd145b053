// pack_bf16 and bf16_gemm on the CPU: the kernels of wna16.h with weights of 16 bits.
#include "ops/wna16.h"

#include "ops/pack_check.h"

namespace qk::cpu {

Tensor pack_bf16(const Tensor& weight) {
  constexpr auto kOp = "pack_bf16";
  check_pack_bf16(kOp, weight);
  const int64_t rows = weight.size(0), cols = weight.size(1);
  const int64_t panels = (rows + kPanelCols - 1) / kPanelCols, steps = wna16_steps(16, cols);
  Tensor packed = output(weight, {panels, steps, kPanelCols}, ScalarType::Int);
  const Wna16Words in = {16, element(weight, 0), weight.stride(0), rows, cols, nullptr};
  const Wna16Kernels& kernels = wna16_kernels();
  parallel_queue(panels, [&](int64_t p) {
    const std::unique_ptr<int32_t[]> room(new int32_t[16 * steps]);
    kernels.pack(in, p, room.get(), data<int32_t>(packed) + p * steps * kPanelCols);
  });
  return packed;
}

Tensor bf16_gemm(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
                 int64_t out_features) {
  constexpr auto kOp = "bf16_gemm";
  check_bf16_gemm(kOp, x, packed, out_features);
  const int64_t cols = x.size(1);
  const Wna16Weight weight = {16,
                              reinterpret_cast<const int32_t*>(element(packed, 0)),
                              out_features,
                              cols,
                              DType::kFloat32,
                              nullptr,
                              nullptr,
                              cols,
                              1,
                              false};
  return wna16_product(kOp, x, weight, nullptr, bias);
}

}  // namespace qk::cpu

STABLE_TORCH_LIBRARY_IMPL(quantkit, CPU, m) {
  m.impl("pack_bf16", TORCH_BOX(&qk::cpu::pack_bf16));
  m.impl("bf16_gemm", TORCH_BOX(&qk::cpu::bf16_gemm));
}
