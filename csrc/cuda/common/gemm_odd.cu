// Products whose groups are no whole units of the tiled kernel: a thread makes eight neighbouring
// results from one word row after the other. Slow, for weights that hardly exist.
#include "cuda/common/gemm_shapes.h"

namespace qk::cuda {
namespace {

template <typename Weight>
__device__ auto activation(const Activations& a, int row, int k) {
  const char* const at = static_cast<const char*>(a.data) + row * a.row_bytes;
  if constexpr (Weight::kScaling == Scaling::kIntGroups) {
    return static_cast<int32_t>(reinterpret_cast<const int8_t*>(at)[k]);
  } else {
    constexpr DType kDType =
        __is_same(typename Weight::Element, BFloat16) ? DType::kBFloat16 : DType::kFloat16;
    float value = 0.0f;  // of planes, whose sum is exact
    for (int plane = a.planes - 1; plane >= 0; --plane)
      value = add_rn(value, load_number(at + plane * a.plane_bytes, kDType, k));
    return value;
  }
}

template <typename Weight>
__global__ void __launch_bounds__(kThreads) odd_kernel(const __grid_constant__ GemmArgs args) {
  constexpr bool kInt = Weight::kScaling == Scaling::kIntGroups;
  using Part = decltype(activation<Weight>(args.a, 0, 0));
  const GroupScales& scales = args.groups;
  const int cols = args.weight.out_features;
  for_each_chunk(args.a.rows, cols, [&](int row, int col, int) {
    const int expert = args.experts.count == 0 ? 0 : expert_of(args.experts, row);
    const int64_t base = expert * scales.expert_scales;
    float sums[kChunk] = {};
    for (int first = 0; first < args.a.depth; first += scales.segment) {
      const int end = min(first + scales.segment, args.a.depth);
      const int group = first / scales.columns;
      Part part[kChunk] = {};
      float factor[kChunk];
      int zero[kChunk];
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const int64_t at = base + scale_index(scales, min(col + i, cols - 1), group);
        factor[i] = load_number(scales.data, scales.dtype, at);
        zero[i] = scales.zero_point == nullptr ? 0 : scales.zero_point[at];
      }
      uint32_t words[kChunk];
      for (int k = first; k < end; ++k) {
        if (k == first || k % Weight::kPerWord == 0)
          load_words(args.weight, expert, col, k / Weight::kPerWord, words);
        const Part a = activation<Weight>(args.a, row, k);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          const auto value = Weight::value(words[i], k % Weight::kPerWord);
          if constexpr (kInt) {
            part[i] += a * (value - zero[i]);
          } else {
            part[i] = fma_rn(a, sub_rn(value, static_cast<float>(zero[i])), part[i]);
          }
        }
      }
      const float input =
          kInt || scales.input == nullptr
              ? 1.0f
              : scales.input[row * scales.input_row_step +
                             first / scales.input_columns * scales.input_group_step];
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        if constexpr (kInt) {
          sums[i] = add_rn(sums[i], mul_rn(static_cast<float>(part[i]), factor[i]));
        } else {
          sums[i] = fma_rn(part[i], mul_rn(input, factor[i]), sums[i]);
        }
      }
    }
    finish_chunk<Weight>(args, expert, row, col, sums);
  });
}

template <typename Weight>
cudaError_t launch_odd(const GemmArgs& args, cudaStream_t stream) {
  const ChunkGrid over = chunk_grid(args.a.rows, args.weight.out_features);
  return launch(odd_kernel<Weight>, over.grid, over.block, 0, stream, args);
}

}  // namespace

cudaError_t gemm_of_odd_groups(WeightKind kind, DType dtype, const GemmArgs& args,
                               cudaStream_t stream) {
  const bool half = dtype == DType::kFloat16;
  switch (kind) {
    case WeightKind::kInt4ByInt8:
      return launch_odd<WeightInt4ByInt8>(args, stream);
    case WeightKind::kInt4:
      return half ? launch_odd<WeightInt4<Float16>>(args, stream)
                  : launch_odd<WeightInt4<BFloat16>>(args, stream);
    case WeightKind::kByte:
      return half ? launch_odd<WeightByte<Float16>>(args, stream)
                  : launch_odd<WeightByte<BFloat16>>(args, stream);
    case WeightKind::kFloat8:
      return half ? launch_odd<WeightFloat8<Float16>>(args, stream)
                  : launch_odd<WeightFloat8<BFloat16>>(args, stream);
    default:
      return cudaErrorInvalidValue;  // their scales are not of groups
  }
}

}  // namespace qk::cuda
