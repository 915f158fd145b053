// What the attention ops check, whichever kernel serves the call; the words are those of
// ops/attention.py.
#pragma once

#include <cmath>

#include "ops/check.h"

namespace qk {

inline void check_heads(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                        const char* k_name, const char* v_name, int64_t max_size) {
  const struct {
    const char* name;
    const Tensor& x;
  } all[] = {{"q", q}, {k_name, k}, {v_name, v}};
  for (const auto& [name, x] : all) {
    check(x.dim() == 4, op, name, " must be 4-D [batch, heads, tokens, head size], got ", x.dim(),
          "-D");
    check_rows(op, name, x);
    check_same_device(op, name, x, q, "q");
  }
  check_float(op, "q", q);
  const int64_t batch = q.size(0), heads = q.size(1), size = q.size(3);
  check(k.size(0) == batch && k.size(3) == size && k.size(1) > 0 && heads % k.size(1) == 0, op,
        k_name, " must be [", batch, ", heads that divide ", heads, ", tokens, ", size, "], got ",
        text_of(k.sizes()));
  for (int64_t d = 0; d < 4; ++d) {
    check(v.size(d) == k.size(d), op, v_name, " must have the shape of ", k_name, " ",
          text_of(k.sizes()), ", got ", text_of(v.sizes()));
  }
  check(size % 16 == 0 && 0 < size && size <= max_size, op,
        "the head size must be a multiple of 16, at most ", max_size, ", got ", size);
}

inline void check_bounds(const char* op, const Tensor& q, const OptionalTensor& starts,
                         const OptionalTensor& lengths) {
  const int64_t batch = q.size(0);
  const struct {
    const char* name;
    const OptionalTensor& x;
  } both[] = {{"starts", starts}, {"lengths", lengths}};
  for (const auto& [name, x] : both) {
    check(!x || (x->scalar_type() == ScalarType::Long && x->dim() == 1 && x->size(0) == batch), op,
          name, " must be torch.int64 [", batch, "], a number per batch row, got ",
          name_of(x ? x->scalar_type() : ScalarType::Long), " ",
          x ? text_of(x->sizes()) : std::string());
    if (x) check_same_device(op, name, *x, q, "q");
  }
}

inline void check_softmax(const char* op, double scale, int64_t window) {
  check(std::isfinite(scale) && scale > 0, op, "scale must be positive and finite, got ", scale);
  check(window >= 0, op, "window must not be negative, got ", window);
}

// q, k and v of attention on numbers.
inline void check_attention(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                            bool causal, double scale, const OptionalTensor& starts,
                            const OptionalTensor& lengths, int64_t window, int64_t max_size) {
  check_heads(op, q, k, v, "k", "v", max_size);
  const struct {
    const char* name;
    const Tensor& x;
  } both[] = {{"k", k}, {"v", v}};
  for (const auto& [name, x] : both) {
    check(x.scalar_type() == q.scalar_type(), op, name, " must be of q's dtype ",
          name_of(q.scalar_type()), ", got ", name_of(x.scalar_type()));
  }
  const int64_t tokens = q.size(2), keys = k.size(2);
  check(tokens <= keys || !(causal || window), op,
        "with causal or window, q must have no more tokens than k, got ", tokens, " and ", keys);
  check_bounds(op, q, starts, lengths);
  check_softmax(op, scale, window);
}

}  // namespace qk
