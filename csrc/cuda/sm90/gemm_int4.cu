// Products of 16-bit numbers with int4 weights.
#include "cuda/sm90/gemm_kernel.h"

namespace qk::cuda::sm90 {

QUANTKIT_WGMMA_OF(KindSixteen<WeightInt4<BFloat16>>)
QUANTKIT_WGMMA_OF(KindSixteen<WeightInt4<Float16>>)

}  // namespace qk::cuda::sm90
