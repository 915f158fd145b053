// Products of int8 codes with int8 weights.
#include "cuda/sm90/gemm_kernel.h"

namespace qk::cuda::sm90 {

template <>
cudaError_t gemm_of<KindInt8>(const GemmArgs& args, const GemmPlan& plan, void* workspace,
                              cudaStream_t stream) {
  if (plan.shape == 0) return launch_gemm<KindInt8, 128>(args, plan, workspace, stream);
  return launch_gemm<KindInt8, 256>(args, plan, workspace, stream);
}

}  // namespace qk::cuda::sm90
