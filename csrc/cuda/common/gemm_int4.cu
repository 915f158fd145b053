// Products of 16-bit numbers with int4 weights.
#include "cuda/common/gemm_shapes.h"

namespace qk::cuda {

QUANTKIT_GEMM_OF(WeightInt4<BFloat16>)
QUANTKIT_GEMM_OF(WeightInt4<Float16>)

}  // namespace qk::cuda
