// What the attention ops on the CPU do alike.
#pragma once

#include <memory>

#include "ops/attention_check.h"
#include "ops/cpu_ops.h"

namespace qk::cpu {

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
