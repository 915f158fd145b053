// Products of int8 codes with int4 weights whose groups are no multiple of 64 columns, but of 32.
#include "cuda/common/gemm_shapes.h"

namespace qk::cuda {

QUANTKIT_GEMM_OF(WeightInt4ByInt8Short)

}  // namespace qk::cuda
