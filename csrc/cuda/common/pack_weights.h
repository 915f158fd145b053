// Weights laid out for the GEMMs: words of neighbouring k, and of 64 output channels side by side.
#pragma once

#include "cuda/common/types.h"

namespace qk::cuda {

// How the words of a source become those of the layout (python/quantkit/ops/*.py have them all).
enum class WeightLayout {
  kInt8,    // int8 codes [N, K]: four to a word, then a word of int32 sums
  kFloat8,  // e4m3 codes [N, K]: the first, third, second and fourth; then NaN where there is one
  kInt4ByInt8,  // int32 words of unsigned int4: byte j has element j and element 4 + j
  kInt4,        // int32 words of unsigned codes: the even ones in the lower half
  kByte,
  kBFloat16,  // bf16 numbers [N, K], two to a word
};

struct WeightSource {
  const void* data;
  int64_t stride;       // between rows, in elements of the source
  int rows, cols;       // N, K
  const int32_t* perm;  // columns of kInt4 and kByte are taken in this order; null: as they are
};

// `words` int32 [ceil(N / 64)][words of K, and one more for kInt8 and kFloat8][64].
cudaError_t pack_weight(WeightLayout layout, const WeightSource& source, void* words,
                        cudaStream_t stream);

}  // namespace qk::cuda
