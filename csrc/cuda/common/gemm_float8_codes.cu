// Products of FP8 codes with FP8 weights.
#include "cuda/common/gemm_shapes.h"

namespace qk::cuda {

QUANTKIT_GEMM_OF(WeightFloat8Codes)

}  // namespace qk::cuda
