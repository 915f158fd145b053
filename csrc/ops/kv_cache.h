// What the ops on an 8-bit cache of keys and values share; the words are those of ops/kv_cache.py.
#pragma once

#include <string>

#include "ops/attention_check.h"

namespace qk::cpu {

// A cache [B, H, capacity, D] and its scale.
inline void check_cache(const char* op, const std::string& name, const Tensor& cache,
                        const Tensor& scale) {
  check(cache.scalar_type() == ScalarType::Char || cache.scalar_type() == ScalarType::Float8_e4m3fn,
        op, name, "_cache must be int8 or float8_e4m3fn, got ", name_of(cache.scalar_type()));
  check(cache.dim() == 4, op, name, "_cache must be 4-D [batch, heads, capacity, head size], got ",
        cache.dim(), "-D");
  check_rows(op, (name + "_cache").c_str(), cache);
  const int64_t batch = cache.size(0), heads = cache.size(1), capacity = cache.size(2);
  const bool by_head = scale.dim() == 1 && (scale.size(0) == 1 || scale.size(0) == heads);
  const bool by_token = scale.dim() == 3 && scale.size(0) == batch && scale.size(1) == heads &&
                        scale.size(2) == capacity;
  check((by_head || by_token) && scale.scalar_type() == ScalarType::Float, op, name,
        "_scale must be torch.float32 [1], [", heads, "] for each head, or [", batch, ", ", heads,
        ", ", capacity, "] for each token, got ", name_of(scale.scalar_type()), " ",
        text_of(scale.sizes()));
  check(scale.is_contiguous(), op, name, "_scale must be contiguous, got strides ",
        text_of(scale.strides()));
}

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
