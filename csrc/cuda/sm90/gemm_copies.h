// The ring of stages in shared memory through which a block's tiles come, and the warps that fill
// it.
#pragma once

#include "cuda/common/gemm_tile.h"
#include "cuda/sm90/gemm_kinds.h"

namespace qk::cuda::sm90 {

constexpr int kPanels = 2;  // that multiply: panels of a tile
constexpr int kGroupThreads = 128, kBlockThreads = (kPanels + 1) * kGroupThreads;
constexpr int kGroupWarps = kGroupThreads / kWarp, kMultiplyingWarps = kPanels * kGroupWarps;
template <typename Kind, int kTokens_>
struct Scratch {
  static constexpr int kTokens = kTokens_;
  static constexpr int kCopied =
      kTokens * kStageBytes + kPanels * Kind::kStageRows * kWordRowBytes;  // bytes of a stage
  static constexpr int kInputs = Kind::kTotals ? kTokens : 0;
  static constexpr int kMostStages = (212 << 10) / (kCopied + kInputs * 4);
  static constexpr int kStages = kMostStages < 8 ? kMostStages : 8;
  static constexpr int kRoomRows = 16, kRoomCols = 20;  // 16 and what keeps banks apart

  alignas(1024) unsigned char tokens[kStages][kTokens][kStageBytes];
  unsigned char words[kStages][kPanels][Kind::kStageRows][kWordRowBytes];
  uint32_t room[kMultiplyingWarps][kRoomRows][kRoomCols];
  uint32_t inputs[kStages][kInputs > 0 ? kInputs : 1];  // of the rows, for a stage's columns
  Barrier full[kStages], empty[kStages];
};

// What both sides of the ring know.
template <typename Kind, int kTokens>
struct TileLoop {
  using Shared = Scratch<Kind, kTokens>;

  const GemmArgs& args;
  const GemmPlan& plan;
  Shared& scratch;
  int lane, units;
  TilePlace place;
  RingPlace<Shared::kStages> ring;

  __device__ TileLoop(const GemmArgs& args, const GemmPlan& plan)
      : args(args),
        plan(plan),
        scratch(shared<Shared>()),
        lane(threadIdx.x % kWarp),
        units((args.a.depth + Kind::kDepth - 1) / Kind::kDepth) {}

  template <typename Function>
  __device__ void each_tile(Function f) {
    const int64_t tiles = int64_t{plan.row_tiles} * plan.panel_tiles * plan.splits;
    for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
      place = place_of_tile(args, plan, index, kTokens, kPanels, units);
      if (place.row < place.row_end) f();
    }
  }
};

template <typename Kind, int kTokens>
__device__ void copy_tiles(TileLoop<Kind, kTokens>& loop, const TensorMap& tokens,
                           const TensorMap& words) {
  using Shared = Scratch<Kind, kTokens>;
  Shared& scratch = loop.scratch;
  auto& ring = loop.ring;
  const int panels = (loop.args.weight.out_features + kPanel - 1) / kPanel;
  loop.each_tile([&] {
    const TilePlace& place = loop.place;
    const int panel = place.expert * panels + place.panel;
    for (int unit = place.first_unit; unit < place.end_unit; ++unit) {
      wait_for(scratch.empty[ring.stage], ring.parity ^ 1);
      if (loop.lane == 0) {
        Barrier& full = scratch.full[ring.stage];
        arrive_expecting(full, Shared::kCopied);
        copy_tile(scratch.tokens[ring.stage], tokens, full, unit * kStageBytes, place.row);
        copy_tile(scratch.words[ring.stage], words, full, 0, 0, unit * Kind::kStageRows, panel);
      }
      sync_warp();
      ring.advance();
    }
  });
}

// What belongs to rows and changes along K: scales, or the sums of codes that go with zero points.
// Those of a stage go through shared memory.
struct RowInputs {
  const uint32_t* data;  // null: none
  int columns;
  int64_t row_step, group_step;
};
template <typename Kind>
__device__ RowInputs row_inputs(const GroupScales& scales) {
  if constexpr (Kind::kIntGroups) {
    const int32_t* const sums = scales.zero_point == nullptr ? nullptr : scales.input_sums;
    return {reinterpret_cast<const uint32_t*>(sums), scales.columns, scales.groups, 1};
  } else {
    const float* const input = Kind::kTotals && scales.segment > 0 ? scales.input : nullptr;
    return {reinterpret_cast<const uint32_t*>(input), scales.input_columns, scales.input_row_step,
            scales.input_group_step};
  }
}

constexpr int kInputWarps = 3;  // take turns, so that several loads are under way

template <typename Kind, int kTokens>
__device__ void load_inputs(TileLoop<Kind, kTokens>& loop) {
  auto& ring = loop.ring;
  const RowInputs inputs = row_inputs<Kind>(loop.args.groups);
  const int mine = static_cast<int>(threadIdx.x) / kWarp - 1;
  int turn = 0;
  loop.each_tile([&] {
    const TilePlace& place = loop.place;
    for (int unit = place.first_unit; unit < place.end_unit; ++unit) {
      if (turn == mine) {
        const int64_t at = unit * Kind::kDepth / inputs.columns * inputs.group_step;
        uint32_t values[kTokens / kWarp];
#pragma unroll
        for (int i = 0; i < kTokens / kWarp; ++i) {
          const int row = place.row + i * kWarp + loop.lane;
          values[i] = row < place.row_end ? inputs.data[row * inputs.row_step + at] : 0u;
        }
        wait_for(loop.scratch.empty[ring.stage], ring.parity ^ 1);
#pragma unroll
        for (int i = 0; i < kTokens / kWarp; ++i)
          loop.scratch.inputs[ring.stage][i * kWarp + loop.lane] = values[i];
        arrive(loop.scratch.full[ring.stage]);
      }
      turn = turn + 1 == kInputWarps ? 0 : turn + 1;
      ring.advance();
    }
  });
}

}  // namespace qk::cuda::sm90
