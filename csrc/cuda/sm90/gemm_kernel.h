// One kernel for products of many rows, weight times transposed activations (so that the weight, of
// whatever bits, is the side that wgmma takes from registers).
//
// A block is three warp groups. A warp of the first asks for tiles, kTokens rows of activations and
// two panels of words, kStages ahead, into a ring in shared memory; each of the others multiplies
// one panel by all of the rows. A full stage is waited for by its bytes, an empty one by the warps
// that have read it. The next stage's registers are made while products of this one run, and while
// one group scales sums or writes results the other keeps the tensor cores busy. Blocks stay for
// tile after tile, with copies running ahead into the next.
//
// Sums of floats are added to others in fp32 where a group of scales ends (and for FP8 after 128
// columns, since the tensor cores keep but 14 bits there); scales multiply them, never weights.
#pragma once

#include "cuda/common/gemm_join.h"
#include "cuda/common/gemm_tile.h"
#include "cuda/sm90/gemm.h"
#include "cuda/sm90/gemm_kinds.h"

namespace qk::cuda::sm90 {

constexpr int kPanels = 2;  // that multiply: panels of a tile
constexpr int kGroupThreads = 128, kBlockThreads = (kPanels + 1) * kGroupThreads;
constexpr int kGroupWarps = kGroupThreads / kWarp, kMultiplyingWarps = kPanels * kGroupWarps;
// Registers of a thread, of the 168 that each begins with.
constexpr int kFewRegisters = 56, kManyRegisters = 224;

template <typename Kind, int kTokens_>
struct Scratch {
  static constexpr int kTokens = kTokens_;
  static constexpr int kCopied =
      kTokens * kStageBytes + kPanels * Kind::kStageRows * kWordRowBytes;  // bytes of a stage
  static constexpr int kInputs = Kind::kFloat ? kTokens : 0;
  static constexpr int kMostStages = (212 << 10) / (kCopied + kInputs * 4);
  static constexpr int kStages = kMostStages < 8 ? kMostStages : 8;
  static constexpr int kRoomRows = 16, kRoomCols = 20;  // 16 and what keeps banks apart

  alignas(1024) unsigned char tokens[kStages][kTokens][kStageBytes];
  unsigned char words[kStages][kPanels][Kind::kStageRows][kWordRowBytes];
  uint32_t room[kMultiplyingWarps][kRoomRows][kRoomCols];
  float inputs[kStages][kInputs > 0 ? kInputs : 1];  // scales of the rows, for a stage's columns
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

// Whether rows have scales that change along K: those of a stage go through shared memory.
template <typename Kind>
__device__ bool has_inputs(const GemmArgs& args) {
  return Kind::kFloat && args.groups.segment > 0 && args.groups.input != nullptr;
}

constexpr int kInputWarps = 3;  // take turns, so that several loads are under way

template <typename Kind, int kTokens>
__device__ void load_inputs(TileLoop<Kind, kTokens>& loop) {
  auto& ring = loop.ring;
  const GroupScales& scales = loop.args.groups;
  const int mine = static_cast<int>(threadIdx.x) / kWarp - 1;
  int turn = 0;
  loop.each_tile([&] {
    const TilePlace& place = loop.place;
    for (int unit = place.first_unit; unit < place.end_unit; ++unit) {
      if (turn == mine) {
        const int64_t at = unit * Kind::kDepth / scales.input_columns * scales.input_group_step;
        float values[kTokens / kWarp];
#pragma unroll
        for (int i = 0; i < kTokens / kWarp; ++i) {
          const int row = place.row + i * kWarp + loop.lane;
          values[i] = row < place.row_end ? scales.input[row * scales.input_row_step + at] : 0.0f;
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

template <typename Kind, int kTokens>
class Multiplier {
 public:
  using Weight = typename Kind::Weight;
  using Shared = Scratch<Kind, kTokens>;
  using Sum = SumOf<typename Kind::Product>;
  static constexpr int kSums = kTokens / 2;
  static constexpr bool kGroups = Kind::kFloat && !Kind::kEveryStage;  // with offsets

  __device__ Multiplier(TileLoop<Kind, kTokens>& loop, void* workspace)
      : loop(loop),
        args(loop.args),
        scratch(loop.scratch),
        workspace(workspace),
        warp(threadIdx.x / kWarp % kGroupWarps),
        group(static_cast<int>(threadIdx.x) / kGroupThreads - 1) {}

  __device__ void run() {
    loop.each_tile([&] {
      first_col = (loop.place.panel + group) * kPanel + warp * 16;
      multiply();
      finish();
    });
  }

 private:
  using Ring = RingPlace<Shared::kStages>;

  // The registers of the stage of this unit, once it is there.
  __device__ void load(Left (&left)[kSteps], const Ring& ring, int unit) {
    if constexpr (kGroups) begin_segment(unit);
    wait_for(scratch.full[ring.stage], ring.parity);
    const StageWords words(scratch.words[ring.stage][group][0]);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) left[step] = Kind::left(words, step, offset);
  }

  __device__ void multiply() {
    const int first = loop.place.first_unit, units = loop.place.end_unit - first;
    if constexpr (Kind::kFloat) {
      segment_units = args.groups.segment / Kind::kDepth;
#pragma unroll
      for (int i = 0; i < kSums; ++i) total[i] = 0.0f;
    }
    fresh = true;
    Left one[kSteps], other[kSteps];
    load(one, loop.ring, first);
#pragma unroll 1
    for (int t = 0; t < units; t += 2) {
      multiply_stage(first + t, one, other);
      if (t + 1 < units) multiply_stage(first + t + 1, other, one);
    }
  }

  // Begins the products of a stage, and makes the registers of the next while they run.
  __device__ __forceinline__ void multiply_stage(int unit, const Left (&left)[kSteps],
                                                 Left (&later)[kSteps]) {
    Ring& ring = loop.ring;
    const Columns columns = columns_at(scratch.tokens[ring.stage]);
    fence_products();
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      begin_product<typename Kind::Product>(sums, left[step], columns.after(32 * step),
                                            !fresh || step > 0);
    commit_products();
    const bool last = unit + 1 == loop.place.end_unit;
    fresh = Kind::kFloat && (last || ends_sums(unit));
    float factor[2] = {1.0f, 1.0f};
    if constexpr (Kind::kFloat) {
      if (fresh && segment_units > 0) load_factors(unit, factor);
    }
    Ring next = ring;
    next.advance();
    if (!last) load(later, next, unit + 1);
    wait_products(sums);
    if constexpr (Kind::kFloat) {
      if (fresh) add_to_total(scratch.inputs[ring.stage], factor);
    }
    sync_warp();
    if (loop.lane == 0) arrive(scratch.empty[ring.stage]);
    ring = next;
  }

  // --- sums of floats: those of a segment, scaled, and all that were before

  __device__ bool ends_sums(int unit) const {
    if constexpr (Kind::kFloat) {
      if (Kind::kEveryStage) return true;
      return segment_units > 0 && (unit + 1) % segment_units == 0;
    }
    return false;
  }

  __device__ int channel(int i) const {
    return min(first_col + loop.lane / 4 * 2 + i, args.weight.out_features - 1);
  }

  // What codes of the thread's channels are less, from this unit on.
  __device__ void begin_segment(int unit) {
    const GroupScales& scales = args.groups;
    const bool begins =
        unit == loop.place.first_unit || (segment_units > 0 && unit % segment_units == 0);
    if (!begins) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t at = loop.place.expert * scales.expert_scales +
                         scale_index(scales, channel(i), unit * Kind::kDepth / scales.columns);
      offset[i] = Weight::offset(scales.zero_point == nullptr ? 0 : scales.zero_point[at]);
    }
  }

  __device__ void load_factors(int unit, float (&factor)[2]) const {
    const GroupScales& scales = args.groups;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t at = loop.place.expert * scales.expert_scales +
                         scale_index(scales, channel(i), unit * Kind::kDepth / scales.columns);
      factor[i] = load_number(scales.data, scales.dtype, at);
    }
  }

  // `inputs` are those of the stage.
  template <int kInputs>
  __device__ void add_to_total(const float (&inputs)[kInputs], const float (&factor)[2]) {
    if constexpr (Kind::kFloat) {
      const auto dot = [&](int i) {
        return Kind::kFactor == 1.0f ? sums[i] : mul_rn(sums[i], Kind::kFactor);
      };
      if (segment_units == 0) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) total[i] = add_rn(total[i], dot(i));
      } else if (args.groups.input == nullptr) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) total[i] = fma_rn(dot(i), factor[i / 2 % 2], total[i]);
      } else {
#pragma unroll
        for (int i = 0; i < kSums; i += 4) {
          const Words2 two = load_vector<Words2>(&inputs[i * 2 + loop.lane % 4 * 2]);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float scale = mul_rn(float_of(two.w[j % 2]), factor[j / 2]);
            total[i + j] = fma_rn(dot(i + j), scale, total[i + j]);
          }
        }
      }
    }
  }

  // Sums of 16 rows at a time through shared memory, where a thread takes eight neighbouring
  // channels of a row.
  __device__ void finish() {
    const int lane = loop.lane, row = lane / 4, pair = lane % 4;
    auto& room = scratch.room[group * kGroupWarps + warp];
#pragma unroll 1
    for (int part = 0; part < kTokens / 16; ++part) {
      const int first_row = loop.place.row + part * 16;
      if (first_row >= loop.place.row_end) break;
#pragma unroll
      for (int p = 0; p < kTokens / 16; ++p) {
        if (p != part) continue;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int at = p * 8 + i / 2 * 4 + i % 2;
          store_vector(&room[i / 2 * 8 + pair * 2 + i % 2][2 * row],
                       Words2{{result_bits(at), result_bits(at + 2)}});
        }
      }
      sync_warp();
      finish_row(first_row + lane / 2, first_col + lane % 2 * kChunk,
                 &room[lane / 2][lane % 2 * kChunk]);
      sync_warp();
    }
  }

  __device__ uint32_t result_bits(int i) const {
    if constexpr (Kind::kFloat) {
      return bits_of(total[i]);
    } else {
      return static_cast<uint32_t>(sums[i]);
    }
  }

  __device__ void finish_row(int row, int col, const uint32_t* from) {
    if (row >= loop.place.row_end || col >= args.weight.out_features) return;
    Sum values[kChunk];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Words4 four = load_vector<Words4>(from + half * 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) values[half * 4 + i] = __builtin_bit_cast(Sum, four.w[i]);
    }
    if constexpr (Kind::kFloat) scale_whole(row, col, values);
    if (loop.plan.splits > 1) {
      store_part(args, static_cast<Sum*>(workspace), loop.place.split, row, col, values);
    } else {
      finish_chunk<Weight>(args, loop.place.expert, row, col, values);
    }
  }

  // By scales that are the same along K.
  __device__ void scale_whole(int row, int col, float (&values)[kChunk]) const {
    const GroupScales& scales = args.groups;
    if (segment_units > 0 || scales.data == nullptr) return;
    const float input = scales.input == nullptr ? 1.0f : scales.input[row * scales.input_row_step];
    const int64_t base = loop.place.expert * scales.expert_scales;
    ScaleWalk walk(scales, col, args.weight.out_features, 0);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const float factor = load_number(scales.data, scales.dtype, base + walk.next());
      values[i] = mul_rn(values[i], mul_rn(input, factor));
    }
  }

  TileLoop<Kind, kTokens>& loop;
  const GemmArgs& args;
  Shared& scratch;
  void* const workspace;
  const int warp, group;
  int first_col;  // of the warp
  bool fresh;     // sums begin anew
  Sum sums[kSums];
  float total[Kind::kFloat ? kSums : 1];
  int segment_units;  // of a segment; 0: all of K
  Offset offset[2];
};

template <typename Kind, int kTokens>
__global__ void __launch_bounds__(kBlockThreads, 1)
    wgmma_kernel(const __grid_constant__ GemmArgs args, const __grid_constant__ GemmPlan plan,
                 const __grid_constant__ TensorMap tokens, const __grid_constant__ TensorMap words,
                 void* workspace) {
  using Shared = Scratch<Kind, kTokens>;
  Shared& scratch = shared<Shared>();
  if (threadIdx.x == 0) {
    prefetch_map(tokens);
    prefetch_map(words);
    for (int stage = 0; stage < Shared::kStages; ++stage) {
      make_barrier(scratch.full[stage], has_inputs<Kind>(args) ? 1 + kWarp : 1);
      make_barrier(scratch.empty[stage], kMultiplyingWarps);
    }
    publish_barriers();
  }
  sync_block();
  TileLoop<Kind, kTokens> loop(args, plan);
  if (threadIdx.x < kGroupThreads) {
    give_registers<kFewRegisters>();
    if (threadIdx.x < kWarp) {
      copy_tiles(loop, tokens, words);
    } else if constexpr (Kind::kFloat) {
      if (has_inputs<Kind>(args)) load_inputs(loop);
    }
  } else {
    take_registers<kManyRegisters>();
    Multiplier<Kind, kTokens>(loop, workspace).run();
  }
}

template <typename Kind, int kTokens>
cudaError_t launch_gemm(const GemmArgs& args, const GemmPlan& plan, void* workspace,
                        cudaStream_t stream) {
  constexpr int kNumberBytes = kStageBytes / Kind::kDepth;
  const int64_t panels = ceil_div(args.weight.out_features, kPanel);
  const int64_t experts = args.experts.count == 0 ? 1 : args.experts.count;
  // The stride of a single row may be anything, and does not count.
  const int64_t row_bytes = args.a.rows > 1 ? args.a.row_bytes : 16;
  TensorMap tokens, words;
  cudaError_t status = make_tensor_map({args.a.data,
                                        2,
                                        {int64_t{args.a.depth} * kNumberBytes, args.a.rows, 1, 1},
                                        {1, row_bytes, 0, 0},
                                        {kStageBytes, kTokens, 1, 1}},
                                       &tokens);
  if (status != cudaSuccess) return status;
  status = make_tensor_map({args.weight.words,
                            4,
                            {kTileRowBytes, 2, args.weight.word_rows, panels * experts},
                            {1, kTileRowBytes, kWordRowBytes, args.weight.panel_words * 4},
                            {kTileRowBytes, 2, Kind::kStageRows, kPanels}},
                           &words);
  if (status != cudaSuccess) return status;
  const int64_t tiles = int64_t{plan.row_tiles} * plan.panel_tiles * plan.splits;
  const int64_t blocks = multiprocessors();
  status = launch(wgmma_kernel<Kind, kTokens>, dim3(grid_extent(tiles < blocks ? tiles : blocks)),
                  dim3(kBlockThreads), sizeof(Scratch<Kind, kTokens>), stream, args, plan, tokens,
                  words, workspace);
  if (status != cudaSuccess || plan.splits == 1) return status;
  return join_of<typename Kind::Weight>(args, plan.splits, workspace, stream);
}

// The kernels of one kind, for tiles of 128 rows and, if it has them, 256; each in its own .cu.
template <typename Kind>
cudaError_t gemm_of(const GemmArgs& args, const GemmPlan& plan, void* workspace,
                    cudaStream_t stream);

#define QUANTKIT_WGMMA_OF(Kind)                                                          \
  template <>                                                                            \
  cudaError_t gemm_of<Kind>(const GemmArgs& args, const GemmPlan& plan, void* workspace, \
                            cudaStream_t stream) {                                       \
    return launch_gemm<Kind, 128>(args, plan, workspace, stream);                        \
  }

template <>
cudaError_t gemm_of<KindInt8>(const GemmArgs&, const GemmPlan&, void*, cudaStream_t);
template <>
cudaError_t gemm_of<KindFloat8>(const GemmArgs&, const GemmPlan&, void*, cudaStream_t);
template <>
cudaError_t gemm_of<KindSixteen<WeightInt4<BFloat16>>>(const GemmArgs&, const GemmPlan&, void*,
                                                       cudaStream_t);
template <>
cudaError_t gemm_of<KindSixteen<WeightInt4<Float16>>>(const GemmArgs&, const GemmPlan&, void*,
                                                      cudaStream_t);
template <>
cudaError_t gemm_of<KindSixteen<WeightByte<BFloat16>>>(const GemmArgs&, const GemmPlan&, void*,
                                                       cudaStream_t);
template <>
cudaError_t gemm_of<KindSixteen<WeightByte<Float16>>>(const GemmArgs&, const GemmPlan&, void*,
                                                      cudaStream_t);
template <>
cudaError_t gemm_of<KindSixteen<WeightFloat8<BFloat16>>>(const GemmArgs&, const GemmPlan&, void*,
                                                         cudaStream_t);
template <>
cudaError_t gemm_of<KindSixteen<WeightFloat8<Float16>>>(const GemmArgs&, const GemmPlan&, void*,
                                                        cudaStream_t);
template <>
cudaError_t gemm_of<KindSixteen<WeightBFloat16>>(const GemmArgs&, const GemmPlan&, void*,
                                                 cudaStream_t);

}  // namespace qk::cuda::sm90
