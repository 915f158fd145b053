// Products of 16-bit numbers with int8 weights.
#include "cuda/common/gemm_shapes.h"

namespace qk::cuda {

QUANTKIT_GEMM_OF(WeightByte<BFloat16>)
QUANTKIT_GEMM_OF(WeightByte<Float16>)

}  // namespace qk::cuda
