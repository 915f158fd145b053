// Attention of a few queries on an 8-bit cache of keys and values, in chunks of keys whose results
// are merged afterwards.
#pragma once

#include <cstdint>

#include "cpu/types.h"

namespace qk {

constexpr int64_t kCacheChunk = 512;  // keys of a call
constexpr int kCacheRows = 4;         // queries of a call
constexpr int64_t kMaxCacheHeadSize = 512;

// One head of a cache: codes (int8 or e4m3) by rows, and a scale for each key or one for all.
struct CacheHead {
  DType format;
  const uint8_t *k, *v;
  int64_t k_stride, v_stride;
  const float *k_scale, *v_scale;
  int64_t k_scale_stride, v_scale_stride;  // 0: one for all
  int64_t size;
};

// What a row has of a chunk: [0] its largest logit, [1] the sum of 2^(logit - largest), and from
// kCacheSums on the sum of values with those weights.
constexpr int64_t kCacheSums = 16;

struct KvCacheKernels {
  // q: fp32 [rows][size], `factor` is the logits' scale with log2(e) in it. Keys [begin, end), at
  // least one and at most kCacheChunk. parts: [rows], `part_stride` apart.
  void (*attend)(const CacheHead& head, const float* q, int rows, float factor, int64_t begin,
                 int64_t end, float* parts, int64_t part_stride);
  // The results of n chunks, one row's [kCacheSums + size] behind the other, as `dtype`. None with
  // n = 0: zeros.
  void (*merge)(const float* parts, int64_t n, int64_t size, DType dtype, void* out);
  // fp32 of a query.
  void (*widen)(DType dtype, const void* q, int64_t size, float* out);
};

// Those of the instruction set that dispatch.h chose.
const KvCacheKernels& kv_cache_kernels();

}  // namespace qk
