// Which tiles the kernels for a kind of weight have: for 16, 32, 64 and 128 rows. The first ones
// keep much of the weight under way, for it is all that is read; the last is for arithmetic. None
// takes more shared memory than sm_86 has.
#pragma once

#include "cuda/common/gemm_kernel.h"

namespace qk::cuda {

template <int kWords, bool kWholeDepth>  // kWholeDepth: a warp has all of K
struct ShapesOf;
template <>
struct ShapesOf<1, false> {
  using Few = Tiles<1, 2, 4, 1, 8, 4>;
  using Some = Tiles<1, 4, 2, 2, 4, 4>;
  using More = Tiles<1, 4, 2, 4, 4, 4>;
  using Many = Tiles<2, 4, 1, 4, 2, 4>;
};
template <>
struct ShapesOf<2, false> {
  using Few = Tiles<1, 2, 4, 1, 4, 4>;
  using Some = Tiles<1, 4, 2, 2, 2, 4>;
  using More = Tiles<1, 4, 2, 4, 2, 4>;
  using Many = Tiles<2, 4, 1, 4, 2, 4>;
};
template <>
struct ShapesOf<4, false> {
  using Few = Tiles<1, 2, 4, 1, 4, 4>;
  using Some = Tiles<1, 4, 2, 2, 2, 4>;
  using More = Tiles<1, 4, 2, 4, 2, 4>;
  using Many = Tiles<2, 4, 1, 4, 2, 3>;
};
template <>
struct ShapesOf<2, true> {
  using Few = Tiles<1, 4, 1, 1, 4, 4>;
  using Some = Tiles<1, 4, 1, 2, 2, 4>;
  using More = Tiles<1, 4, 1, 4, 2, 4>;
  using Many = Tiles<2, 4, 1, 4, 2, 4>;
};

template <typename Weight>
struct ShapesFor : ShapesOf<Weight::kWords, Weight::kScaling == Scaling::kIntGroups> {};
// Twice the sums of WeightInt8 would not fit into the registers.
template <>
struct ShapesFor<WeightFloat8Codes> : ShapesOf<4, false> {
  using More = Tiles<2, 4, 1, 2, 2, 4>;
  using Many = Tiles<4, 2, 1, 2, 2, 4>;
};
// As ShapesOf<2, true>, of units half as long.
template <>
struct ShapesFor<WeightInt4ByInt8Short> {
  using Few = Tiles<1, 4, 1, 1, 8, 4>;
  using Some = Tiles<1, 4, 1, 2, 4, 4>;
  using More = Tiles<1, 4, 1, 4, 4, 4>;
  using Many = Tiles<2, 4, 1, 4, 4, 4>;
};
template <typename Weight>
using Shapes = ShapesFor<Weight>;

// Calls f with the tiles that a plan names.
template <typename Weight, typename Function>
auto with_tiles(int shape, Function f) {
  switch (shape) {
    case 0:
      return f(typename Shapes<Weight>::Few{});
    case 1:
      return f(typename Shapes<Weight>::Some{});
    case 2:
      return f(typename Shapes<Weight>::More{});
    default:
      return f(typename Shapes<Weight>::Many{});
  }
}

// The kernels of one kind of weight, each in its own .cu: they take long to compile.
template <typename Weight>
cudaError_t gemm_of(const GemmArgs& args, const GemmPlan& plan, void* workspace,
                    cudaStream_t stream);

#define QUANTKIT_GEMM_OF(Weight)                                                           \
  QUANTKIT_JOIN_OF(Weight)                                                                 \
  template <>                                                                              \
  cudaError_t gemm_of<Weight>(const GemmArgs& args, const GemmPlan& plan, void* workspace, \
                              cudaStream_t stream) {                                       \
    return with_tiles<Weight>(plan.shape, [&](auto tiles) {                                \
      return launch_gemm<Weight, decltype(tiles)>(args, plan, workspace, stream);          \
    });                                                                                    \
  }

template <>
cudaError_t gemm_of<WeightInt8>(const GemmArgs&, const GemmPlan&, void*, cudaStream_t);
template <>
cudaError_t gemm_of<WeightInt4ByInt8>(const GemmArgs&, const GemmPlan&, void*, cudaStream_t);
template <>
cudaError_t gemm_of<WeightInt4ByInt8Short>(const GemmArgs&, const GemmPlan&, void*, cudaStream_t);
template <>
cudaError_t gemm_of<WeightInt4<BFloat16>>(const GemmArgs&, const GemmPlan&, void*, cudaStream_t);
template <>
cudaError_t gemm_of<WeightInt4<Float16>>(const GemmArgs&, const GemmPlan&, void*, cudaStream_t);
template <>
cudaError_t gemm_of<WeightByte<BFloat16>>(const GemmArgs&, const GemmPlan&, void*, cudaStream_t);
template <>
cudaError_t gemm_of<WeightByte<Float16>>(const GemmArgs&, const GemmPlan&, void*, cudaStream_t);
template <>
cudaError_t gemm_of<WeightFloat8<BFloat16>>(const GemmArgs&, const GemmPlan&, void*, cudaStream_t);
template <>
cudaError_t gemm_of<WeightFloat8<Float16>>(const GemmArgs&, const GemmPlan&, void*, cudaStream_t);
template <>
cudaError_t gemm_of<WeightFloat8Codes>(const GemmArgs&, const GemmPlan&, void*, cudaStream_t);
template <>
cudaError_t gemm_of<WeightBFloat16>(const GemmArgs&, const GemmPlan&, void*, cudaStream_t);

}  // namespace qk::cuda
