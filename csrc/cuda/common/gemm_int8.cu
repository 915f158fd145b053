// Products of int8 codes with int8 weights.
#include "cuda/common/gemm_shapes.h"

namespace qk::cuda {

QUANTKIT_GEMM_OF(WeightInt8)

}  // namespace qk::cuda
