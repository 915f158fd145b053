// One product with weights that wna16.h knows: x packed, then the panels spread over threads.
#pragma once

#include "cpu/wna16.h"

#include <memory>

#include "ops/gemm_check.h"
#include "ops/panels.h"

namespace qk::cpu {

// y = x W^T + bias; `order` is null or which column of x is the k-th.
inline Tensor wna16_product(const char* op, const Tensor& x, const Wna16Weight& weight,
                            const int32_t* order, const std::optional<Tensor>& bias) {
  const int64_t rows = x.size(0), cols = x.size(1);
  check_plain_bias(op, bias, x, weight.rows);
  Tensor y = output(x, {rows, weight.rows}, x.scalar_type());
  if (y.numel() == 0) return y;

  const Wna16Kernels& kernels = wna16_kernels();
  const DType dtype = dtype_of(op, x.scalar_type());
  const RowsInput input = {dtype, element(x, 0), x.stride(0), cols, order, nullptr};
  const int64_t depth = kernels.depth(weight, dtype);
  const bool with_sums = wna16_sums(weight);
  // x's words, its sums. Of a few rows they stay where they are, for the next product: a fresh
  // tensor costs as much as the smallest products do.
  constexpr int64_t kKept = 1 << 16;
  static thread_local const std::unique_ptr<float[]> kept(new float[kKept]);
  const int64_t size = rows * (depth + (with_sums ? weight.groups : 0)) + 16;
  std::optional<Tensor> room;
  if (size > kKept) room = output(x, {size}, ScalarType::Float);
  float* const words = room ? data<float>(*room) : kept.get();
  const PackedRows tiles = {words,        with_sums ? words + rows * depth : nullptr,
                            rows,         depth,
                            kernels.tile, weight.group,
                            weight.groups};
  const auto pack = [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> row(new float[2 * depth + 16]);
    for (int64_t t = begin; t < end; ++t) kernels.pack_tile(weight, input, tiles, t, row.get());
  };
  if (rows <= 2 * kernels.tile) {
    pack(0, tiles.tiles());
  } else {
    parallel_rows(tiles.tiles(), cols * kernels.tile, pack);
  }

  const PanelOutput out = {dtype,         bias ? dtype_of(op, bias->scalar_type()) : dtype,
                           data<char>(y), bias ? element(*bias, 0) : nullptr,
                           weight.rows,   weight.rows};
  const int64_t panel_words = wna16_steps(weight.bits, cols) * kPanelCols;
  parallel_panels(
      tiles, (weight.rows + kPanelCols - 1) / kPanelCols,
      [&](int64_t panel) { return weight.packed + panel * panel_words; },
      [&](int64_t panel, int64_t begin, int64_t end) {
        kernels.gemm(weight, dtype, tiles, panel, begin, end, out);
      });
  return y;
}

}  // namespace qk::cpu
