// pack_fp8 and fp8_gemm on the CPU.
#include "ops/pack_check.h"
#include "ops/fp8_gemm.h"

#include <memory>

#include "ops/gemm_check.h"
#include "ops/panels.h"

namespace qk::cpu {
namespace {

using Optional = std::optional<Tensor>;

// y = bias, where there is nothing to sum up.
void fill_rows(Tensor& y, const Optional& bias) {
  if (!bias) {
    torch::stable::zero_(y);
    return;
  }
  for (int64_t r = 0; r < y.size(0); ++r) {
    Tensor row = torch::stable::select(y, 0, r);
    torch::stable::copy_(row, *bias);
  }
}

}  // namespace

Fp8Arguments check_fp8_gemm(const char* op, const Tensor& x, const Tensor& packed,
                            const Tensor& weight_scale, const Block& weight_block,
                            int64_t out_features, const Optional& input_scale,
                            const std::optional<Block>& input_block, const Optional& bias) {
  const Fp8Grid grid = check_fp8_arguments(op, x, packed, weight_scale, weight_block, out_features,
                                           input_scale, input_block, bias);
  const int64_t cols = x.size(1);
  Fp8Arguments result = {};
  result.weight = {reinterpret_cast<const uint8_t*>(element(packed, 0)),
                   out_features,
                   cols,
                   reinterpret_cast<const float*>(element(weight_scale, 0)),
                   grid.groups,
                   grid.rows,
                   grid.columns};
  result.how = {input_scale || input_block, nullptr, cols};
  if (input_scale) {
    result.how.scale = reinterpret_cast<const float*>(element(*input_scale, 0));
  } else if (input_block) {
    result.tensor = (*input_block)[0] == -1;
    if ((*input_block)[1] > 0) result.how.group = (*input_block)[1];
  }
  return result;
}

Tensor fp8_tensor_scale(const Tensor& x) {
  return symmetric_scale(absmax(x, {-1, -1}), Float8E4M3::kMax, ScalarType::Float);
}

Tensor pack_fp8(const Tensor& codes) {
  constexpr auto kOp = "pack_fp8";
  check_pack_fp8(kOp, codes);
  const int64_t rows = codes.size(0), cols = codes.size(1),
                panels = (rows + kPanelCols - 1) / kPanelCols;
  Tensor packed = output(codes, {panels, fp8_panel_bytes(cols)}, ScalarType::Char);
  if (panels == 0) return packed;
  const auto* const from = reinterpret_cast<const uint8_t*>(element(codes, 0));
  parallel_rows(panels, kPanelCols * cols, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      fp8_pack(from, codes.stride(0), rows, cols, panel, data<uint8_t>(packed));
    }
  });
  return packed;
}

Tensor fp8_gemm(const Tensor& x, const Tensor& packed, const Tensor& weight_scale,
                const Block& weight_block, int64_t out_features, const Optional& input_scale,
                const std::optional<Block>& input_block, const Optional& bias) {
  constexpr auto kOp = "fp8_gemm";
  auto [weight, how, tensor] = check_fp8_gemm(kOp, x, packed, weight_scale, weight_block,
                                              out_features, input_scale, input_block, bias);
  const int64_t rows = x.size(0), cols = x.size(1);
  Tensor y = output(x, {rows, out_features}, x.scalar_type());
  if (y.numel() == 0) return y;
  if (cols == 0) {
    fill_rows(y, bias);
    return y;
  }
  Tensor scale;
  if (tensor) {
    scale = fp8_tensor_scale(x);
    how.scale = data<float>(scale);
  }

  const Fp8Kernels& kernels = fp8_gemm_kernels();
  const DType dtype = dtype_of(kOp, x.scalar_type());
  const Fp8Plan plan = kernels.plan(weight, how, dtype);
  const RowsInput input = {dtype, element(x, 0), x.stride(0), cols, nullptr, nullptr};
  // One allocation: x's words, its scales.
  Tensor room =
      output(x, {rows * (plan.depth + (plan.scaled ? plan.groups : 0)) + 16}, ScalarType::Float);
  float* const words = data<float>(room);
  const PackedRows tiles = {words,        plan.scaled ? words + rows * plan.depth : nullptr,
                            rows,         plan.depth,
                            kernels.tile, plan.size,
                            plan.groups};
  const auto pack = [&](int64_t begin, int64_t end) {
    const std::unique_ptr<char[]> scratch(new char[fp8_room_bytes(cols)]);
    for (int64_t t = begin; t < end; ++t) {
      kernels.pack_tile(plan, how, input, tiles, t, scratch.get());
    }
  };
  if (rows <= 2 * kernels.tile) {
    pack(0, tiles.tiles());
  } else {
    parallel_rows(tiles.tiles(), cols * kernels.tile, pack);
  }

  const PanelOutput out = {dtype,         bias ? dtype_of(kOp, bias->scalar_type()) : dtype,
                           data<char>(y), bias ? element(*bias, 0) : nullptr,
                           out_features,  out_features};
  const int64_t panel_bytes = packed.size(1);
  parallel_panels(
      tiles, packed.size(0), [&](int64_t panel) { return weight.packed + panel * panel_bytes; },
      [&](int64_t panel, int64_t begin, int64_t end) {
        kernels.gemm(plan, weight, tiles, panel, begin, end, out);
      });
  return y;
}

}  // namespace qk::cpu

STABLE_TORCH_LIBRARY_IMPL(quantkit, CPU, m) {
  m.impl("pack_fp8", TORCH_BOX(&qk::cpu::pack_fp8));
  m.impl("fp8_gemm", TORCH_BOX(&qk::cpu::fp8_gemm));
}
