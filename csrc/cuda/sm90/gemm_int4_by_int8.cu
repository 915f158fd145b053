// Products of int8 codes with int4 weights.
#include "cuda/sm90/gemm_kernel.h"

namespace qk::cuda::sm90 {

QUANTKIT_WGMMA_OF(KindInt4ByInt8)

}  // namespace qk::cuda::sm90
