// A split of K leaves parts of the sums in the workspace, [parts][rows][part_pitch], which a second
// kernel adds in order.
#pragma once

#include "cuda/common/gemm_finish.h"

namespace qk::cuda {

template <typename Number>
__device__ void store_part(const GemmArgs& args, Number* parts, int index, int row, int col,
                           const Number (&values)[kChunk]) {
  const int pitch = part_pitch(args.weight.out_features);
  if (col >= pitch) return;
  Number* const to = parts + (int64_t{index} * args.a.rows + row) * pitch + col;
#pragma unroll
  for (int i = 0; i < kChunk; i += 4) {
    const auto word = [&](int k) { return __builtin_bit_cast(uint32_t, values[i + k]); };
    store_vector(to + i, Words4{{word(0), word(1), word(2), word(3)}});
  }
}

template <typename Weight>
__global__ void __launch_bounds__(kThreads)
    join_kernel(const __grid_constant__ GemmArgs args, int parts, const void* workspace) {
  using Number = SumOf<Weight>;
  const int pitch = part_pitch(args.weight.out_features);
  for_each_chunk(args.a.rows, args.weight.out_features, [&](int row, int col, int) {
    Number values[kChunk] = {};
    for (int part = 0; part < parts; ++part) {
      const auto* const from =
          static_cast<const Number*>(workspace) + (int64_t{part} * args.a.rows + row) * pitch + col;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Words4 four = load_vector<Words4>(from + half * 4);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          Number& value = values[half * 4 + i];
          if constexpr (__is_same(Number, int32_t)) {
            value += static_cast<int32_t>(four.w[i]);
          } else {
            value = add_rn(value, float_of(four.w[i]));
          }
        }
      }
    }
    finish_chunk<Weight>(args, expert_of(args.experts, row), row, col, values);
  });
}

// Launches it. Defined beside the weight's kernels in csrc/cuda/common only: the same kernel
// compiled in csrc/cuda/sm90 would be another one, for sm_90a alone, and which of them a program
// gets would be the linker's to choose.
template <typename Weight>
cudaError_t join_of(const GemmArgs& args, int parts, const void* workspace, cudaStream_t stream);

#define QUANTKIT_JOIN_OF(Weight)                                                                  \
  template <>                                                                                     \
  cudaError_t join_of<Weight>(const GemmArgs& args, int parts, const void* workspace,             \
                              cudaStream_t stream) {                                              \
    const ChunkGrid over = chunk_grid(args.a.rows, args.weight.out_features);                     \
    return launch(join_kernel<Weight>, over.grid, over.block, 0, stream, args, parts, workspace); \
  }

template <>
cudaError_t join_of<WeightInt8>(const GemmArgs&, int, const void*, cudaStream_t);
template <>
cudaError_t join_of<WeightInt4ByInt8>(const GemmArgs&, int, const void*, cudaStream_t);
template <>
cudaError_t join_of<WeightInt4ByInt8Short>(const GemmArgs&, int, const void*, cudaStream_t);
template <>
cudaError_t join_of<WeightInt4<BFloat16>>(const GemmArgs&, int, const void*, cudaStream_t);
template <>
cudaError_t join_of<WeightInt4<Float16>>(const GemmArgs&, int, const void*, cudaStream_t);
template <>
cudaError_t join_of<WeightByte<BFloat16>>(const GemmArgs&, int, const void*, cudaStream_t);
template <>
cudaError_t join_of<WeightByte<Float16>>(const GemmArgs&, int, const void*, cudaStream_t);
template <>
cudaError_t join_of<WeightFloat8<BFloat16>>(const GemmArgs&, int, const void*, cudaStream_t);
template <>
cudaError_t join_of<WeightFloat8<Float16>>(const GemmArgs&, int, const void*, cudaStream_t);
template <>
cudaError_t join_of<WeightFloat8Codes>(const GemmArgs&, int, const void*, cudaStream_t);
template <>
cudaError_t join_of<WeightBFloat16>(const GemmArgs&, int, const void*, cudaStream_t);

}  // namespace qk::cuda
