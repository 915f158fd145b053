// Scratch of the GEMMs on the CPU.
#pragma once

#include "ops/cpu_ops.h"

namespace qk::cpu {

// Scratch of one call, cut into aligned parts.
class Arena {
 public:
  template <typename T>
  int64_t reserve(int64_t count) {
    const int64_t at = size_;
    size_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return at;
  }
  void allocate(const Tensor& like) { memory_ = output(like, {size_}, ScalarType::Char); }
  template <typename T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(data<char>(memory_) + offset);
  }

 private:
  int64_t size_ = 0;
  Tensor memory_;
};

}  // namespace qk::cpu
