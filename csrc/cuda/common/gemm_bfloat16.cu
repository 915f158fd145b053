// Products of bf16 numbers with bf16 weights.
#include "cuda/common/gemm_shapes.h"

namespace qk::cuda {

QUANTKIT_GEMM_OF(WeightBFloat16)

}  // namespace qk::cuda
