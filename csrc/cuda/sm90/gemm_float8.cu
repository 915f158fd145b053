// Products of 16-bit numbers with FP8 weights.
#include "cuda/sm90/gemm_kernel.h"

namespace qk::cuda::sm90 {

QUANTKIT_WGMMA_OF(KindSixteen<WeightFloat8<BFloat16>>)
QUANTKIT_WGMMA_OF(KindSixteen<WeightFloat8<Float16>>)

}  // namespace qk::cuda::sm90
