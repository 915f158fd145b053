// Products of bf16 numbers with bf16 weights.
#include "cuda/sm90/gemm_kernel.h"

namespace qk::cuda::sm90 {

QUANTKIT_WGMMA_OF(KindSixteen<WeightBFloat16>)

}  // namespace qk::cuda::sm90
