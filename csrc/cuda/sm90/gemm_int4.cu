// Products of 16-bit numbers with int4 weights.
#include "cuda/sm90/gemm_kernel.h"

namespace qk::cuda::sm90 {

template <>
cudaError_t gemm_of<KindSixteen<WeightInt4<BFloat16>>>(const GemmArgs& args, const GemmPlan& plan,
                                                       void* workspace, cudaStream_t stream) {
  return launch_gemm<KindSixteen<WeightInt4<BFloat16>>, 128>(args, plan, workspace, stream);
}
template <>
cudaError_t gemm_of<KindSixteen<WeightInt4<Float16>>>(const GemmArgs& args, const GemmPlan& plan,
                                                      void* workspace, cudaStream_t stream) {
  return launch_gemm<KindSixteen<WeightInt4<Float16>>, 128>(args, plan, workspace, stream);
}

}  // namespace qk::cuda::sm90
