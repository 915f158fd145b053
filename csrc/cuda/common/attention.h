// Attention with int8 products of queries and keys (SageAttention), or with all products in bf16:
// keys and values are packed once per head of theirs, then blocks of queries go over them with an
// online softmax.
#pragma once

#include "cuda/common/types.h"

namespace qk::cuda {

constexpr int kAttentionPad = 64;     // packed keys are a multiple of this
constexpr int kAttentionChunk = 512;  // keys that one block of the statistics takes
constexpr int kMaxHeadSize = 512;

// Heads of tokens in device memory: element (b, h, t, i) lies at b * strides[0] + h * strides[1] +
// t * strides[2] + i of `data`.
struct HeadRows {
  const void* data;
  DType dtype;
  int64_t strides[3];
};

struct AttentionShape {
  int batch, heads, kv_heads, tokens, keys, size;

  __host__ __device__ int padded() const {
    return (keys + kAttentionPad - 1) / kAttentionPad * kAttentionPad;
  }
  __host__ __device__ int chunks() const { return (keys + kAttentionChunk - 1) / kAttentionChunk; }
};

struct AttentionHow {
  bool codes;  // queries and keys in int8, else in bf16
  bool smooth_k, per_token, int8_values, causal;
  int64_t window;                   // 0: none
  float scale;                      // of the logits, log2(e) in it
  const int64_t *starts, *lengths;  // a number for each batch row, or null
};

// Packed keys and values, an item for each batch row and head of keys. keys: int8 or bf16 [padded,
// size]; values: bf16 [padded, size] or int8 [padded / 32, size, 32], each 32 keys in the order in
// which `attend` multiplies them. bad_before [padded + 1]: how many keys before each have anything
// that is not finite; these count as zeros.
struct AttentionPacked {
  void *keys, *values;
  float *key_scale, *value_scale, *mean;
  int* bad_before;
  float* partial;  // [chunks, 2, size] of scratch
  uint8_t* bad;    // [padded] of scratch
};

cudaError_t pack_keys(const AttentionShape& shape, const HeadRows& k, const HeadRows& v,
                      const AttentionHow& how, const AttentionPacked& packed, cudaStream_t stream);

// out [batch, tokens, heads, size] of q's dtype.
cudaError_t attend(const AttentionShape& shape, const HeadRows& q, const AttentionHow& how,
                   const AttentionPacked& packed, void* out, cudaStream_t stream);

}  // namespace qk::cuda
