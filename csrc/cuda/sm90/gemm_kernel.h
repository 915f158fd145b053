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
#include "cuda/sm90/gemm.h"
#include "cuda/sm90/gemm_copies.h"

namespace qk::cuda::sm90 {

// Registers of a thread, of the 168 that each begins with.
constexpr int kFewRegisters = 56, kManyRegisters = 224;

template <typename Kind, int kTokens>
class Multiplier {
 public:
  using Weight = typename Kind::Weight;
  using Shared = Scratch<Kind, kTokens>;
  using Sum = ProductSum<typename Kind::Product>;
  static constexpr int kSums = kTokens / 2;
  static constexpr bool kOffsets = Kind::kTotals && !Kind::kEveryStage && !Kind::kIntGroups;
  using Result = SumOf<Weight>;  // int32 or float

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

  // Of a channel in a segment.
  struct Factor {
    float scale = 1.0f;
    int zero = 0;
  };

  // The registers of the stage of this unit, once it is there.
  __device__ void load(Left (&left)[kSteps], const Ring& ring, int unit) {
    if constexpr (kOffsets) begin_segment(unit);
    wait_for(scratch.full[ring.stage], ring.parity);
    const StageWords words(scratch.words[ring.stage][group][0]);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) left[step] = Kind::left(words, step, offset);
  }

  __device__ void multiply() {
    const int first = loop.place.first_unit, units = loop.place.end_unit - first;
    if constexpr (Kind::kTotals) {
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
    fresh = Kind::kTotals && (last || ends_sums(unit));
    Factor factor[2];
    if constexpr (Kind::kTotals) {
      if (fresh && (segment_units > 0 || Kind::kIntGroups)) load_factors(unit, factor);
    }
    Ring next = ring;
    next.advance();
    if (!last) load(later, next, unit + 1);
    wait_products(sums);
    if constexpr (Kind::kTotals) {
      if (fresh) add_to_total(scratch.inputs[ring.stage], factor);
    }
    sync_warp();
    if (loop.lane == 0) arrive(scratch.empty[ring.stage]);
    ring = next;
  }

  // --- sums of floats: those of a segment, scaled, and all that were before

  __device__ bool ends_sums(int unit) const {
    if constexpr (Kind::kTotals) {
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

  __device__ void load_factors(int unit, Factor (&factor)[2]) const {
    const GroupScales& scales = args.groups;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t at = loop.place.expert * scales.expert_scales +
                         scale_index(scales, channel(i), unit * Kind::kDepth / scales.columns);
      factor[i].scale = load_number(scales.data, scales.dtype, at);
      if constexpr (Kind::kIntGroups)
        factor[i].zero = scales.zero_point == nullptr ? 0 : scales.zero_point[at];
    }
  }

  // `inputs` are those of the stage.
  template <int kInputs>
  __device__ void add_to_total(const uint32_t (&inputs)[kInputs], const Factor (&factor)[2]) {
    if constexpr (Kind::kIntGroups) {
      const bool corrected = args.groups.zero_point != nullptr;
      each_four(inputs, corrected, [&](int i, const Words2& two) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          int32_t dot = sums[i + j] >> 4;
          if (corrected) dot -= factor[j / 2].zero * static_cast<int32_t>(two.w[j % 2]);
          total[i + j] = add_rn(total[i + j], mul_rn(static_cast<float>(dot), factor[j / 2].scale));
        }
      });
    } else if constexpr (Kind::kTotals) {
      const auto dot = [&](int i) {
        return Kind::kFactor == 1.0f ? sums[i] : mul_rn(sums[i], Kind::kFactor);
      };
      const bool scaled = args.groups.input != nullptr;
      if (segment_units == 0) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) total[i] = add_rn(total[i], dot(i));
        return;
      }
      each_four(inputs, scaled, [&](int i, const Words2& two) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float scale = factor[j / 2].scale;
          if (scaled) scale = mul_rn(float_of(two.w[j % 2]), scale);
          total[i + j] = fma_rn(dot(i + j), scale, total[i + j]);
        }
      });
    }
  }

  // Calls f with the first of four sums, of two rows and two channels, and what belongs to the
  // rows.
  template <int kInputs, typename Function>
  __device__ void each_four(const uint32_t (&inputs)[kInputs], bool there, Function f) const {
#pragma unroll
    for (int i = 0; i < kSums; i += 4) {
      Words2 two = {};
      if (there) two = load_vector<Words2>(&inputs[i * 2 + loop.lane % 4 * 2]);
      f(i, two);
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
    if constexpr (Kind::kTotals) {
      return bits_of(total[i]);
    } else {
      return static_cast<uint32_t>(sums[i]);
    }
  }

  __device__ void finish_row(int row, int col, const uint32_t* from) {
    if (row >= loop.place.row_end || col >= args.weight.out_features) return;
    Result values[kChunk];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Words4 four = load_vector<Words4>(from + half * 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) values[half * 4 + i] = __builtin_bit_cast(Result, four.w[i]);
    }
    if constexpr (Kind::kTotals && !Kind::kIntGroups) scale_whole(row, col, values);
    if (loop.plan.splits > 1) {
      store_part(args, static_cast<Result*>(workspace), loop.place.split, row, col, values);
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
  float total[Kind::kTotals ? kSums : 1];
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
  const bool inputs = row_inputs<Kind>(args.groups).data != nullptr;
  if (threadIdx.x == 0) {
    prefetch_map(tokens);
    prefetch_map(words);
    for (int stage = 0; stage < Shared::kStages; ++stage) {
      make_barrier(scratch.full[stage], inputs ? 1 + kWarp : 1);
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
    } else if constexpr (Kind::kTotals) {
      if (inputs) load_inputs(loop);
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
  const int64_t depth_bytes = int64_t{args.a.depth} * kNumberBytes;
  // The stride of a single row may be anything, and does not count.
  const int64_t row_bytes = args.a.rows > 1 ? args.a.row_bytes : ceil_div(depth_bytes, 16) * 16;
  TensorMap tokens, words;
  cudaError_t status = make_tensor_map({args.a.data,
                                        2,
                                        {depth_bytes, args.a.rows, 1, 1},
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
cudaError_t gemm_of<KindInt4ByInt8>(const GemmArgs&, const GemmPlan&, void*, cudaStream_t);
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
