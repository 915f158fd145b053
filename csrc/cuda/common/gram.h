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

// Floats of workspace that gram needs for so many tokens or fewer; 0 where the tiles of g keep a
// device busy.
int64_t gram_workspace(const Matrix& x);

// g fp32 [cols, cols] contiguous. Its upper half takes the sum of at most kGramTokens tokens and is
// mirrored, in an order that the shape alone decides.
cudaError_t gram(const Matrix& x, const TokenMask& mask, float* g, float* workspace,
                 cudaStream_t stream);

// channels fp32 [3, cols]: least, greatest, sum of magnitudes of each column, onto what is there.
cudaError_t channel_statistics(const Matrix& x, const TokenMask& mask, float* channels,
                               cudaStream_t stream);

}  // namespace qk::cuda
