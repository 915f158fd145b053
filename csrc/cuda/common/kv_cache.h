// An 8-bit cache of keys and values: append, read back, and attention on the codes.
#pragma once

#include "cuda/common/attention.h"

namespace qk::cuda {

// Codes [batch, heads, capacity, size]: token j of head (b, h) begins at b * strides[0] + h *
// strides[1] + j * strides[2]. The scale of a token stands at b * scale_strides[0] + h *
// scale_strides[1] + j * scale_strides[2] (0 where tokens, or heads, share it).
struct Cache {
  uint8_t* codes;
  DType dtype;  // kInt8 or kFloat8E4M3
  int capacity;
  int64_t strides[3];
  float* scale;
  int64_t scale_strides[3];
};

// Rows (b, h, t) of x [batch, heads, tokens, size] go to token positions[b, t] of the cache, those
// that are not within its capacity nowhere; `own_scale`: each brings its scale.
cudaError_t kv_append(const HeadRows& x, const Cache& cache, const int64_t* positions,
                      int64_t position_strides[2], int batch, int heads, int tokens, int size,
                      bool own_scale, cudaStream_t stream);

// out [batch, heads, end - begin, size] in `dtype`.
cudaError_t kv_read(const Cache& cache, int batch, int heads, int begin, int end, int size,
                    DType dtype, void* out, cudaStream_t stream);

// How many parts the keys are cut into, and what `partial` holds for each: for every row of queries
// (heads times tokens) `size` sums, the peak and the total.
int kv_parts(int capacity);

// out [batch, tokens, heads, size] of q's dtype. `shape.keys` is the capacity; how.lengths and
// how.starts as in kv_attention, `how.scale` with log2(e) in it.
cudaError_t kv_attention(const AttentionShape& shape, const HeadRows& q, const AttentionHow& how,
                         const Cache& keys, const Cache& values, float* partial, void* out,
                         cudaStream_t stream);

}  // namespace qk::cuda
