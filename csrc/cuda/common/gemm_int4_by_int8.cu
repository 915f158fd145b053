// Products of int8 codes with int4 weights.
#include "cuda/common/gemm_shapes.h"

namespace qk::cuda {

QUANTKIT_GEMM_OF(WeightInt4ByInt8)

}  // namespace qk::cuda
