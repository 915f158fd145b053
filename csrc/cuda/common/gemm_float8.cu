// Products of 16-bit numbers with FP8 weights.
#include "cuda/common/gemm_shapes.h"

namespace qk::cuda {

QUANTKIT_GEMM_OF(WeightFloat8<BFloat16>)
QUANTKIT_GEMM_OF(WeightFloat8<Float16>)

}  // namespace qk::cuda
