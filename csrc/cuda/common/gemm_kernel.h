// One kernel for all products with packed weights.
//
// A block of threads makes a tile of kRows x kCols results. Activations and words go through shared
// memory, kStages deep (gemm_copies.h). Warps lie kWarpsM x kWarpsN over the tile, kTilesM x 16
// rows by 32 channels each, and where rows are few kWarpsK of them share the units of each stage;
// their sums are added in order at the end. Of the 32 channels a thread's sums are eight
// neighbours, so that results leave in vectors.
//
// Groups: the scales of one multiply its sums when the next begins. For W4A8, whose order of
// summation is fixed (ops/w4a8.py), a warp has all of K, and a split of K leaves the products of
// each group.
#pragma once

#include <type_traits>

#include "cuda/common/gemm_copies.h"
#include "cuda/common/gemm_join.h"

namespace qk::cuda {

template <typename Weight, typename Shape>
class TileGemm {
 public:
  using Scratch = GemmScratch<Weight, Shape>;
  using Part = typename Weight::Part;
  static constexpr int kTilesM = Shape::kTilesM;
  static constexpr int kBytes = kUnitBytes<Weight>, kProducts = kBytes / 32;  // of a unit
  static constexpr bool kGrouped =
      Weight::kScaling == Scaling::kGroups || Weight::kScaling == Scaling::kIntGroups;

  __device__ TileGemm(const GemmArgs& args, const GemmPlan& plan, void* workspace)
      : args(args),
        plan(plan),
        workspace(workspace),
        scratch(shared<Scratch>()),
        lane(threadIdx.x % kWarp),
        warp_m(static_cast<int>(threadIdx.x) / kWarp % Shape::kWarpsM),
        warp_n(static_cast<int>(threadIdx.x) / kWarp / Shape::kWarpsM % Shape::kWarpsN),
        warp_k(static_cast<int>(threadIdx.x) / kWarp / (Shape::kWarpsM * Shape::kWarpsN)) {}

  __device__ void run(int64_t index) {
    const int units = (args.a.depth + Weight::kUnit - 1) / Weight::kUnit;
    place = place_of_tile(args, plan, index, Shape::kRows, Scratch::kPanels, units);
    if (place.row >= place.row_end) return;
    first_col = place.panel * kPanel + warp_n * 32;
    multiply();
    if constexpr (Shape::kWarpsK > 1) add_warps();
    if (warp_k == 0) finish();
  }

 private:
  __device__ void multiply() {
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        part[m][j] = Part{};
        if constexpr (kGrouped) sums[m][j] = Sums{};
      }
    }
    group_begin = group_end = 0;
    const int stages = (place.end_unit - place.first_unit + Shape::kUnits - 1) / Shape::kUnits;
    const int total = max(stages, 0) * args.a.planes;
#pragma unroll 1
    for (int t = 0; t < Shape::kStages - 1; ++t) {
      if (t < total) load_stage<Weight, Shape>(args, place, t, scratch);
      copy_commit();
    }
    for (int t = 0; t < total; ++t) {
      copy_wait<Shape::kStages - 2>();
      sync_block();
      if (t + Shape::kStages - 1 < total)
        load_stage<Weight, Shape>(args, place, t + Shape::kStages - 1, scratch);
      copy_commit();
      const int unit = place.first_unit + t / args.a.planes * Shape::kUnits;
      // Not unrolled: a second copy of what happens at a group's end costs registers, and spills.
#pragma unroll 1
      for (int u = 0; u < Shape::kOwnUnits; ++u) {
        const int own = warp_k * Shape::kOwnUnits + u;
        if (unit + own < place.end_unit) multiply_unit(t % Shape::kStages, own, unit + own);
      }
    }
    if constexpr (kGrouped) end_group();
    copy_wait<0>();
    sync_block();  // the scratch may be written again
  }

  __device__ void multiply_unit(int stage, int own, int unit) {
    if constexpr (kGrouped) {
      if (unit < group_begin || unit >= group_end) {
        end_group();
        begin_group(unit);
      }
    }
    const int row = lane / 4, quarter = lane % 4;
    Words4 words[Weight::kWords];
#pragma unroll
    for (int i = 0; i < Weight::kWords; ++i) {
      const int r = (own * 4 + quarter) * Weight::kWords + i, chunk = warp_n % 2 * 8 + row;
      words[i] =
          load_vector<Words4>(&scratch.words[stage][warp_n / 2][r][Scratch::word_place(r, chunk)]);
    }
    uint32_t b[4][2 * kProducts];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint32_t codes[Weight::kWords];
#pragma unroll
      for (int i = 0; i < Weight::kWords; ++i) codes[i] = words[i].w[j];
      Weight::decode(codes, offset[j], b[j]);
    }
    // Rows after weights: of activations, few registers are held at a time.
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
      using Words = std::conditional_t<kProducts == 2, Words4, Words2>;
      const int r = (warp_m * kTilesM + m) * 16 + row, byte = own * kBytes + quarter * (kBytes / 4);
      const int at = Scratch::a_place(r, byte / 16) + byte % 16;
      const Words upper = load_vector<Words>(&scratch.a[stage][r][at]);
      const Words lower = load_vector<Words>(&scratch.a[stage][r + 8][at]);
#pragma unroll
      for (int p = 0; p < kProducts; ++p) {
        const Left left{{upper.w[2 * p], lower.w[2 * p], upper.w[2 * p + 1], lower.w[2 * p + 1]}};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const Right right{{b[j][2 * p], b[j][2 * p + 1]}};
          if constexpr (__is_same(Part, IntSums)) {
            multiply_add(part[m][j], left, right);
          } else {
            multiply_add<typename Weight::Element>(part[m][j], left, right);
          }
        }
      }
    }
  }

  // --- groups: runs of K with scales of their own, weight and activations taken together

  __device__ void begin_group(int unit) {
    const GroupScales& scales = args.groups;
    const int units = scales.segment / Weight::kUnit;  // 0: all of K
    group_begin = units == 0 ? 0 : unit / units * units;
    group_end = units == 0 ? place.end_unit : group_begin + units;
    weight_group = unit * Weight::kUnit / scales.columns;
    if constexpr (Weight::kScaling == Scaling::kGroups) {
      if constexpr (Weight::kInputScales) input_group = unit * Weight::kUnit / scales.input_columns;
    }
    const int64_t base = place.expert * scales.expert_scales;
    const int cols = args.weight.out_features;
    if (scales.data != nullptr) {
      DType dtype = scales.dtype;
      if constexpr (Weight::kScaling == Scaling::kGroups) {
        if constexpr (Weight::kInputScales) dtype = DType::kFloat32;  // those of FP8 always are
      }
      ScaleWalk walk(scales, first_col + lane % 4 * 8, cols, weight_group);
#pragma unroll
      for (int i = 0; i < 8; ++i) factor[i] = load_number(scales.data, dtype, base + walk.next());
    }
    if constexpr (Weight::kScaling == Scaling::kGroups) {
      if (scales.zero_point == nullptr) {
#pragma unroll
        for (int j = 0; j < 4; ++j) offset[j] = Weight::offset(0);
      } else {
        ScaleWalk walk(scales, first_col + lane / 4 * 4, cols, weight_group);
#pragma unroll
        for (int j = 0; j < 4; ++j)
          offset[j] = Weight::offset(scales.zero_point[base + walk.next()]);
      }
    }
  }

  __device__ void end_group() {
    if (group_begin == group_end) return;
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = place.row + (warp_m * kTilesM + m) * 16 + lane / 4 + half * 8;
        if constexpr (Weight::kScaling == Scaling::kGroups) {
          end_row(m, half, row);
        } else {
          end_int_row(m, half, row);
        }
      }
    }
  }

  __device__ void end_row(int m, int half, int row) {
    if constexpr (Weight::kScaling == Scaling::kGroups) {
      const GroupScales& scales = args.groups;
      float input = 1.0f;
      if constexpr (Weight::kInputScales) {
        if (scales.input != nullptr && row < place.row_end) {
          input = scales.input[row * scales.input_row_step + input_group * scales.input_group_step];
        }
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float& of_group = part[m][i % 4].v[half * 2 + i / 4];
        float& sum = sums[m][i % 4].v[half * 2 + i / 4];
        const float dot = mul_rn(of_group, Weight::kFactor);
        sum =
            scales.data == nullptr ? add_rn(sum, dot) : fma_rn(dot, mul_rn(input, factor[i]), sum);
        of_group = 0.0f;
      }
    }
  }

  __device__ void end_int_row(int m, int half, int row) {
    if constexpr (Weight::kScaling == Scaling::kIntGroups) {
      const GroupScales& scales = args.groups;
      const bool corrected = scales.zero_point != nullptr && row < place.row_end;
      const int input =
          corrected ? scales.input_sums[int64_t{row} * scales.groups + weight_group] : 0;
      ScaleWalk walk(scales, first_col + lane % 4 * 8, args.weight.out_features, weight_group);
      const int8_t* const zeros = scales.zero_point + place.expert * scales.expert_scales;
      float products[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        int32_t& of_group = part[m][i % 4].v[half * 2 + i / 4];
        int32_t dot = of_group >> 4;
        const int64_t at = walk.next();
        if (corrected) dot -= zeros[at] * input;
        of_group = 0;
        products[i] = mul_rn(static_cast<float>(dot), factor[i]);
        float& sum = sums[m][i % 4].v[half * 2 + i / 4];
        sum = add_rn(sum, products[i]);
      }
      // Of a split, the products of every group, which the second kernel adds in order.
      if (plan.splits > 1 && row < place.row_end) {
        store_part(args, static_cast<float*>(workspace), weight_group, row,
                   first_col + lane % 4 * 8, products);
      }
    }
  }

  // --- results

  // The warps that share units leave their sums in the scratch, and the first adds them in order.
  __device__ void add_warps() {
    constexpr int kNumbers = kTilesM * 16, kOthers = Shape::kWarpsM * Shape::kWarpsN;
    static_assert((Shape::kWarpsK - 1) * kOthers * kNumbers * kWarp * 4 <= sizeof(Scratch));
    uint32_t* const room = reinterpret_cast<uint32_t*>(&scratch);
    const int warp = warp_n * Shape::kWarpsM + warp_m;
    const auto place_of = [&](int k, int number) {
      return (((k - 1) * kOthers + warp) * kNumbers + number) * kWarp + lane;
    };
    if (warp_k > 0) {
      each_number([&](int number, auto& value) {
        room[place_of(warp_k, number)] = __builtin_bit_cast(uint32_t, value);
      });
    }
    sync_block();
    if (warp_k == 0) {
      for (int k = 1; k < Shape::kWarpsK; ++k) {
        each_number([&](int number, auto& value) {
          if constexpr (__is_same(Part, IntSums)) {
            value += static_cast<int32_t>(room[place_of(k, number)]);
          } else {
            value = add_rn(value, float_of(room[place_of(k, number)]));
          }
        });
      }
    }
    sync_block();
  }

  template <typename Function>
  __device__ void each_number(Function f) {
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if constexpr (!kGrouped) {
            f((m * 4 + j) * 4 + i, part[m][j].v[i]);
          } else {
            f((m * 4 + j) * 4 + i, sums[m][j].v[i]);
          }
        }
      }
    }
  }

  __device__ void finish() {
    const int col = first_col + lane % 4 * 8;
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = place.row + (warp_m * kTilesM + m) * 16 + lane / 4 + half * 8;
        if (row >= place.row_end || col >= args.weight.out_features) continue;
        using Number = SumOf<Weight>;
        Number values[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if constexpr (!kGrouped) {
            values[i] = part[m][i % 4].v[half * 2 + i / 4];
          } else {
            values[i] = sums[m][i % 4].v[half * 2 + i / 4];
          }
        }
        if (plan.splits == 1) {
          finish_chunk<Weight>(args, place.expert, row, col, values);
        } else if constexpr (Weight::kScaling != Scaling::kIntGroups) {
          store_part(args, static_cast<Number*>(workspace), place.split, row, col, values);
        }
      }
    }
  }

  const GemmArgs& args;
  const GemmPlan& plan;
  void* const workspace;
  Scratch& scratch;
  const int lane, warp_m, warp_n, warp_k;
  TilePlace place;
  int first_col;  // of the warp
  Part part[kTilesM][4];
  Sums sums[kGrouped ? kTilesM : 1][4];
  int group_begin, group_end;  // units
  int weight_group, input_group;
  float factor[8];
  Offset offset[4];
};

template <typename Weight, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    gemm_kernel(const __grid_constant__ GemmArgs args, const __grid_constant__ GemmPlan plan,
                void* workspace) {
  TileGemm<Weight, Shape> tile(args, plan, workspace);
  const int64_t tiles = int64_t{plan.row_tiles} * plan.panel_tiles * plan.splits;
  for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) tile.run(index);
}

template <typename Weight, typename Shape>
cudaError_t launch_gemm(const GemmArgs& args, const GemmPlan& plan, void* workspace,
                        cudaStream_t stream) {
  const int64_t tiles = int64_t{plan.row_tiles} * plan.panel_tiles * plan.splits;
  const cudaError_t status =
      launch(gemm_kernel<Weight, Shape>, dim3(grid_extent(tiles)), dim3(Shape::kThreads),
             sizeof(GemmScratch<Weight, Shape>), stream, args, plan, workspace);
  if (status != cudaSuccess || plan.splits == 1) return status;
  const int parts = Weight::kScaling == Scaling::kIntGroups ? args.groups.groups : plan.splits;
  return join_of<Weight>(args, parts, workspace, stream);
}

}  // namespace qk::cuda
