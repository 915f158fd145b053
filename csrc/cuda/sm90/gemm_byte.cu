// Products of 16-bit numbers with int8 weights.
#include "cuda/sm90/gemm_kernel.h"

namespace qk::cuda::sm90 {

QUANTKIT_WGMMA_OF(KindSixteen<WeightByte<BFloat16>>)
QUANTKIT_WGMMA_OF(KindSixteen<WeightByte<Float16>>)

}  // namespace qk::cuda::sm90
