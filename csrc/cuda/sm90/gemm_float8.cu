// Products of FP8 codes with FP8 weights.
#include "cuda/sm90/gemm_kernel.h"

namespace qk::cuda::sm90 {

template <>
cudaError_t gemm_of<KindFloat8>(const GemmArgs& args, const GemmPlan& plan, void* workspace,
                                cudaStream_t stream) {
  return launch_gemm<KindFloat8, 128>(args, plan, workspace, stream);
}

}  // namespace qk::cuda::sm90
