// What the ops on an 8-bit cache of keys and values do alike on the CPU.
#pragma once

#include "ops/attention_cpu.h"
#include "ops/kv_cache_check.h"

namespace qk::cpu {

// Where the scale of a token is, of contiguous [1], [H] or [B, H, capacity].
inline int64_t scale_index(const Tensor& cache, const Tensor& scale, int64_t b, int64_t h,
                           int64_t place) {
  if (scale.dim() == 1) return scale.size(0) == 1 ? 0 : h;
  return (b * cache.size(1) + h) * cache.size(2) + place;
}

inline int64_t row_index(const Tensor& x, int64_t b, int64_t h, int64_t t) {
  return b * x.stride(0) + h * x.stride(1) + t * x.stride(2);
}

}  // namespace qk::cpu
