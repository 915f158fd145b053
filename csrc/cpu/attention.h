// Attention with INT8 products of queries and keys (SageAttention), or with 16-bit ones: keys and
// values are packed once per head of theirs, in blocks of kKeyBlock; a block of queries then goes
// over them with an online softmax.
#pragma once

#include <cstdint>

#include "cpu/types.h"

namespace qk {

constexpr int64_t kKeyBlock = 256;    // keys of one step of the online softmax
constexpr int64_t kScaleBlock = 64;   // tokens that share a scale, unless each has its own
constexpr int64_t kQueryBlock = 192;  // queries of a call: whole scale blocks, whole tiles of rows
constexpr int64_t kMaxHeadSize = 512;

// Keys and values of one head, row-strided, of which [begin, end) are valid. Those with anything
// that is not finite are marked in `bad` (one for each key) and count as zeros.
struct AttentionKeys {
  DType dtype;
  const void* k;
  int64_t k_stride;
  const void* v;
  int64_t v_stride;
  int64_t size;  // of a head
  int64_t begin, end;
  uint8_t* bad;
};

// The same as `attend` reads them. Of null `key_scale` keys, and queries, are in 16 bit, and so are
// values; of null `value_scale`, values are.
struct AttentionPacked {
  void* keys;
  float* key_scale;
  void* values;
  const float* value_scale;
  const uint8_t* bad;  // null if there are none
};

// Query t of one head sees keys [max(begin, t + shift - window), end), and if `causal` those before
// t + shift.
struct AttentionQueries {
  DType dtype;
  const void* q;
  int64_t q_stride;
  void* out;
  int64_t out_stride;
  int64_t size;
  int64_t tokens;
  int64_t begin, end;
  int64_t shift, window;
  bool causal;
  float scale;  // of the logits, log2(e) in it
  bool per_token;
};

struct AttentionKernels {
  int key_depth[2];    // head-size elements in a word (32 bits) of packed keys, int8 and 16 bit
  int value_depth[2];  // keys in a word of packed values, in 16 bit and in int8
  // Marks the bad ones among keys [first, last), which are valid, and gives their number. sums
  // [size]: the sum of the others; amax [size]: the largest magnitudes of their values.
  int64_t (*statistics)(const AttentionKeys& keys, int64_t first, int64_t last, float* sums,
                        float* amax);
  // Keys of block `block`, less `mean` [size], and its values.
  void (*pack)(const AttentionKeys& keys, int64_t block, const float* mean, bool per_token,
               const AttentionPacked& packed, void* scratch);
  // Queries [first, first + kQueryBlock) that there are.
  void (*attend)(const AttentionQueries& queries, const AttentionPacked& packed, int64_t first,
                 void* scratch);
};

// What `pack` and `attend` need, beginning at a cache line (64 bytes): 16 rows of words; queries'
// words, sums and six numbers each, and logits and weights of a tile of at most 8 rows.
constexpr int64_t kPackScratchBytes = 16 * 4 * kMaxHeadSize;
constexpr int64_t attention_scratch_bytes(int64_t size) {
  return kQueryBlock * 4 * (kMaxHeadSize + size + 6) + 2 * 8 * 4 * kKeyBlock;
}

// Those of the instruction set that dispatch.h chose.
const AttentionKernels& attention_kernels();

}  // namespace qk
