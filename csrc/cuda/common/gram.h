// g += x^T x, and statistics of x's channels.
#pragma once

#include "cuda/common/types.h"

namespace qk::cuda {

struct TokenMask {
  const bool* data;  // null: all tokens count
  int64_t stride;
};

// Tokens of one launch: sums in registers are not to grow longer.
constexpr int kGramTokens = 8192;

// g fp32 [cols, cols] contiguous. Its upper half takes the sum of at most kGramTokens tokens and is
// mirrored.
cudaError_t gram(const Matrix& x, const TokenMask& mask, float* g, cudaStream_t stream);

// channels fp32 [3, cols]: least, greatest, sum of magnitudes of each column, onto what is there.
cudaError_t channel_statistics(const Matrix& x, const TokenMask& mask, float* channels,
                               cudaStream_t stream);

}  // namespace qk::cuda
