// What the ops on an 8-bit cache of keys and values check, whichever kernel serves the call; the
// words are those of ops/kv_cache.py.
#pragma once

#include <string>

#include "ops/attention_check.h"

namespace qk {

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
  check_same_device(op, (name + "_scale").c_str(), scale, cache, (name + "_cache").c_str());
}

inline void check_append(const char* op, const Tensor& k, const Tensor& v, const Tensor& k_cache,
                         const Tensor& v_cache, const Tensor& k_scale, const Tensor& v_scale,
                         const Tensor& positions) {
  const struct {
    const char* name;
    const Tensor &x, &cache, &scale;
  } both[] = {{"k", k, k_cache, k_scale}, {"v", v, v_cache, v_scale}};
  for (const auto& [name, x, cache, scale] : both) {
    check_float(op, name, x);
    check_cache(op, name, cache, scale);
    const int64_t expected[] = {cache.size(0), cache.size(1),
                                positions.dim() ? positions.size(-1) : 0, cache.size(3)};
    bool same = x.dim() == 4;
    for (int64_t d = 0; same && d < 4; ++d) same = x.size(d) == expected[d];
    check(same, op, name, " must be ", text_of({expected, 4}),
          " for this cache and these positions, got ", text_of(x.sizes()));
    check_rows(op, name, x);
    check_same_device(op, name, x, k, "k");
    check_same_device(op, (std::string(name) + "_cache").c_str(), cache, k, "k");
  }
  check_same_device(op, "positions", positions, k, "k");
  check(positions.scalar_type() == ScalarType::Long && positions.dim() == 2 &&
            positions.size(0) == k_cache.size(0),
        op, "positions must be torch.int64 [", k_cache.size(0), ", new tokens], got ",
        name_of(positions.scalar_type()), " ", text_of(positions.sizes()));
}

inline void check_read(const char* op, const Tensor& cache, const Tensor& scale, int64_t begin,
                       int64_t end, ScalarType dtype) {
  check_cache(op, "kv", cache, scale);
  check(0 <= begin && begin <= end && end <= cache.size(2), op,
        "[begin, end) must lie within the capacity ", cache.size(2), ", got [", begin, ", ", end,
        ")");
  check(is_float(dtype), op, "dtype must be float32, float16 or bfloat16, got ", name_of(dtype));
}

// `max_size`: of a head.
inline void check_cache_attention(const char* op, const Tensor& q, const Tensor& k_cache,
                                  const Tensor& v_cache, const Tensor& k_scale,
                                  const Tensor& v_scale, double scale, const OptionalTensor& starts,
                                  const OptionalTensor& lengths, int64_t window, int64_t max_size) {
  check_heads(op, q, k_cache, v_cache, "k_cache", "v_cache", max_size);
  check_cache(op, "k", k_cache, k_scale);
  check_cache(op, "v", v_cache, v_scale);
  check(v_cache.scalar_type() == k_cache.scalar_type(), op, "v_cache must be of k_cache's dtype ",
        name_of(k_cache.scalar_type()), ", got ", name_of(v_cache.scalar_type()));
  check_bounds(op, q, starts, lengths);
  check_softmax(op, scale, window);
}

}  // namespace qk
