// Products of FP8 codes with FP8 weights.
#include "cuda/sm90/gemm_kernel.h"

namespace qk::cuda::sm90 {

QUANTKIT_WGMMA_OF(KindFloat8)

}  // namespace qk::cuda::sm90
