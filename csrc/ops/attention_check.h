// What the attention ops on the CPU check alike; the words are those of ops/attention.py.
#pragma once

#include <cmath>
#include <memory>

#include "ops/cpu_ops.h"

namespace qk::cpu {

using OptionalTensor = std::optional<Tensor>;

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

inline void check_bounds(const char* op, int64_t batch, const OptionalTensor& starts,
                         const OptionalTensor& lengths) {
  const struct {
    const char* name;
    const OptionalTensor& x;
  } both[] = {{"starts", starts}, {"lengths", lengths}};
  for (const auto& [name, x] : both) {
    check(!x || (x->scalar_type() == ScalarType::Long && x->dim() == 1 && x->size(0) == batch), op,
          name, " must be torch.int64 [", batch, "], a number per batch row, got ",
          name_of(x ? x->scalar_type() : ScalarType::Long), " ",
          x ? text_of(x->sizes()) : std::string());
  }
}

inline void check_softmax(const char* op, double scale, int64_t window) {
  check(std::isfinite(scale) && scale > 0, op, "scale must be positive and finite, got ", scale);
  check(window >= 0, op, "window must not be negative, got ", window);
}

// Element b of `bound`, or `otherwise` if there is none.
inline int64_t bound_of(const OptionalTensor& bound, int64_t b, int64_t otherwise) {
  if (!bound) return otherwise;
  return *reinterpret_cast<const int64_t*>(element(*bound, b * bound->stride(0)));
}

// [B, H, T, D] as a view of [B, T, H, D], which is how the projection after it reads it.
inline Tensor attention_output(const Tensor& q) {
  return torch::stable::transpose(
      output(q, {q.size(0), q.size(2), q.size(1), q.size(3)}, q.scalar_type()), 1, 2);
}

// parallel_queue with `bytes` of scratch for each thread, aligned to cache lines: f(i, scratch).
template <typename Body>
void parallel_queue_with_scratch(int64_t n, int64_t bytes, const Body& body) {
  std::atomic<int64_t> next = 0;
  const int64_t threads = std::min<int64_t>(n, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const std::unique_ptr<char[]> memory(new char[bytes + 64]);  // not cleared
    void* const scratch =
        reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) / 64 * 64);
    for (int64_t i = next++; i < n; i = next++) body(i, scratch);
  });
}

}  // namespace qk::cpu
