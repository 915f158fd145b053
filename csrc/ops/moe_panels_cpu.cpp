// moe_wna16_gemm and moe_fp8_gemm on the CPU: rows are packed into the tiles of their expert, which
// are multiplied by its weight decoded on the way.
#include <memory>

#include "cpu/wna16.h"
#include "ops/fp8_gemm.h"
#include "ops/moe.h"

namespace qk::cpu {
namespace {

using Optional = std::optional<Tensor>;

constexpr int64_t kPieceTiles = 86;  // a thread takes at a time: what a pass over a panel is worth

// x of all experts: `depth` words a row and, if asked for, a number for each of `groups`.
class Tiles {
 public:
  Tiles(const Moe& moe, const Tensor& x, int64_t depth, int64_t tile, int64_t group, int64_t groups,
        bool sums)
      : moe_(moe),
        room_(output(x, {moe.rows * (depth + (sums ? groups : 0)) + 16}, ScalarType::Float)) {
    float* const words = data<float>(room_);
    float* const numbers = words + moe.rows * depth;
    for (const Expert& e : moe.experts) {
      tiles_.push_back({words + e.begin * depth, sums ? numbers + e.begin * groups : nullptr,
                        e.rows(), depth, tile, group, groups});
    }
  }
  const PackedRows& operator[](int64_t expert) const { return tiles_[expert]; }

  std::vector<MoePiece> pieces(int64_t most, int64_t panels) const {
    const auto tiles = [&](const Expert& e) { return tiles_[&e - moe_.experts.data()].tiles(); };
    return moe_pieces(moe_, most, panels, tiles);
  }
  // The rows of y that a piece gives.
  std::pair<int64_t, int64_t> rows(const MoePiece& p) const {
    const int64_t first = moe_.experts[p.expert].begin;
    return {first + tiles_[p.expert].first_row(p.begin), first + tiles_[p.expert].first_row(p.end)};
  }

 private:
  const Moe& moe_;
  Tensor room_;
  std::vector<PackedRows> tiles_;
};

PanelOutput output_of(const Moe& moe, const Expert& e, const Optional& bias) {
  return {moe.dtype,
          bias ? dtype_of(moe.op, bias->scalar_type()) : moe.dtype,
          data<char>(moe.y) + e.begin * moe.out_features * moe.element_bytes(),
          bias ? part_data(*bias, e.index) : nullptr,
          moe.out_features,
          moe.out_features};
}

// Scratch for each thread, allocated by its own hands.
template <typename T>
class Scratch {
 public:
  Scratch(int64_t threads, int64_t size) : size_(size), rooms_(threads) {}
  T* of(int64_t thread) {
    if (!rooms_[thread]) rooms_[thread].reset(new T[size_]);
    return rooms_[thread].get();
  }

 private:
  int64_t size_;
  std::vector<std::unique_ptr<T[]>> rooms_;
};

}  // namespace

Tensor moe_wna16_gemm(const Tensor& x, const Tensor& offsets, const Tensor& packed,
                      const Tensor& weight_scale, int64_t out_features, int64_t num_bits,
                      int64_t group_size, const Optional& weight_zero_point, const Optional& perm,
                      const Optional& bias, const Optional& row_scale) {
  const Moe moe = check_moe("moe_wna16_gemm", x, offsets, out_features, row_scale);
  check_stack(moe, "packed", packed, offsets);
  check_stack(moe, "weight_scale", weight_scale, offsets);
  check_stack(moe, "weight_zero_point", weight_zero_point, offsets);
  check_stack(moe, "perm", perm, offsets);
  check_stack(moe, "bias", bias, offsets);
  if (packed.size(0) == 0) return moe.y;
  const int64_t cols = moe.in_features;
  const auto check_part = [&](int64_t e) {
    wna16_gemm(no_rows(x), part(packed, e), part(weight_scale, e), part(weight_zero_point, e),
               part(perm, e), part(bias, e), num_bits, out_features, group_size);
  };
  check_part(0);
  for (const Expert& e : moe.experts) {
    if (perm && e.index > 0) check_part(e.index);  // its numbers
  }
  if (moe.y.numel() == 0) return moe.y;

  const Wna16Kernels& kernels = wna16_kernels();
  const int64_t groups = group_size == -1 ? 1 : cols / group_size;
  std::vector<Wna16Weight> weights;
  for (const Expert& e : moe.experts) {
    weights.push_back(
        {static_cast<int>(num_bits), reinterpret_cast<const int32_t*>(part_data(packed, e.index)),
         out_features, cols, dtype_of(moe.op, weight_scale.scalar_type()),
         part_data(weight_scale, e.index),
         weight_zero_point ? reinterpret_cast<const int8_t*>(part_data(*weight_zero_point, e.index))
                           : nullptr,
         cols / groups, groups, weight_scale.dim() == 4});
  }
  const int64_t depth = kernels.depth(weights[0], moe.dtype);
  const Tiles tiles(moe, x, depth, kernels.tile, cols / groups, groups, wna16_sums(weights[0]));
  Scratch<float> scratch(moe.threads(), 2 * depth + 16);
  moe_product(
      moe, kPanelCols, tiles.pieces(1, 1),
      [&](const MoePiece& p, int64_t thread) {
        const Expert& e = moe.experts[p.expert];
        const RowsInput input = {
            moe.dtype,
            moe.row(e.begin),
            moe.x_stride,
            cols,
            perm ? reinterpret_cast<const int32_t*>(part_data(*perm, e.index)) : nullptr,
            nullptr};
        kernels.pack_tile(weights[p.expert], input, tiles[p.expert], p.begin, scratch.of(thread));
      },
      tiles.pieces(kPieceTiles, packed.size(1)),
      [&](const MoePiece& p, const MoePiece*, int64_t) {
        kernels.gemm(weights[p.expert], moe.dtype, tiles[p.expert], p.panel, p.begin, p.end,
                     output_of(moe, moe.experts[p.expert], bias));
        return tiles.rows(p);
      });
  return moe.y;
}

Tensor moe_fp8_gemm(const Tensor& x, const Tensor& offsets, const Tensor& packed,
                    const Tensor& weight_scale, int64_t out_features, const Block& weight_block,
                    const Optional& input_scale, const std::optional<Block>& input_block,
                    const Optional& bias, const Optional& row_scale) {
  Moe moe = check_moe("moe_fp8_gemm", x, offsets, out_features, row_scale);
  check_stack(moe, "packed", packed, offsets);
  check_stack(moe, "weight_scale", weight_scale, offsets);
  check_stack(moe, "input_scale", input_scale, offsets);
  check_stack(moe, "bias", bias, offsets);
  if (packed.size(0) == 0) return moe.y;
  Tensor numbers = input_scale ? *input_scale : Tensor();
  const Optional number =
      input_scale ? Optional(torch::stable::narrow(numbers, 0, 0, 1)) : std::nullopt;
  const Fp8Arguments first =
      check_fp8_gemm(moe.op, x, part(packed, 0), part(weight_scale, 0), weight_block, out_features,
                     number, input_block, part(bias, 0));
  if (moe.y.numel() == 0) return moe.y;
  const int64_t cols = moe.in_features;
  if (cols == 0) {  // no products: what the bias is, one expert at a time
    for (const Expert& e : moe.experts) {
      Tensor rows = torch::stable::narrow(moe.y, 0, e.begin, e.rows());
      for (int64_t r = 0; r < e.rows(); ++r) {
        Tensor row = torch::stable::select(rows, 0, r);
        bias ? torch::stable::copy_(row, part(*bias, e.index)) : torch::stable::zero_(row);
      }
    }
    if (moe.row_scale) {
      moe_kernels().scale_rows(moe.dtype, data<void>(moe.y), out_features, 0, moe.rows,
                               out_features, moe.row_scale);
    }
    return moe.y;
  }

  const Fp8Kernels& kernels = fp8_gemm_kernels();
  std::vector<Fp8Weight> weights;
  std::vector<Fp8Quantizer> hows;
  std::vector<Tensor> kept;
  for (const Expert& e : moe.experts) {
    weights.push_back(first.weight);
    weights.back().packed = reinterpret_cast<const uint8_t*>(part_data(packed, e.index));
    weights.back().scale = reinterpret_cast<const float*>(part_data(weight_scale, e.index));
    hows.push_back(first.how);
    if (input_scale) {
      hows.back().scale = reinterpret_cast<const float*>(part_data(*input_scale, e.index));
    } else if (first.tensor) {
      Tensor all = x;
      kept.push_back(fp8_tensor_scale(torch::stable::narrow(all, 0, e.begin, e.rows())));
      hows.back().scale = data<float>(kept.back());
    }
  }
  const Fp8Plan plan = kernels.plan(weights[0], hows[0], moe.dtype);
  const Tiles tiles(moe, x, plan.depth, kernels.tile, plan.size, plan.groups, plan.scaled);
  Scratch<char> scratch(moe.threads(), fp8_room_bytes(cols));
  moe_product(
      moe, kPanelCols, tiles.pieces(1, 1),
      [&](const MoePiece& p, int64_t thread) {
        const Expert& e = moe.experts[p.expert];
        const RowsInput input = {moe.dtype, moe.row(e.begin), moe.x_stride, cols, nullptr, nullptr};
        kernels.pack_tile(plan, hows[p.expert], input, tiles[p.expert], p.begin,
                          scratch.of(thread));
      },
      tiles.pieces(kPieceTiles, packed.size(1)),
      [&](const MoePiece& p, const MoePiece*, int64_t) {
        kernels.gemm(plan, weights[p.expert], tiles[p.expert], p.panel, p.begin, p.end,
                     output_of(moe, moe.experts[p.expert], bias));
        return tiles.rows(p);
      });
  return moe.y;
}

}  // namespace qk::cpu

STABLE_TORCH_LIBRARY_IMPL(quantkit, CPU, m) {
  m.impl("moe_wna16_gemm", TORCH_BOX(&qk::cpu::moe_wna16_gemm));
  m.impl("moe_fp8_gemm", TORCH_BOX(&qk::cpu::moe_fp8_gemm));
}
