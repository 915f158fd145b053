// Loops that are unrolled while they are compiled.
#pragma once

#include <type_traits>

namespace qk {

// f(i) with i known at compile time, from 0 on: arrays that are indexed so are registers, where GCC
// 12 leaves others in memory.
template <int kCount, int i = 0, class Body>
__attribute__((always_inline)) inline void each(Body body) {
  if constexpr (i < kCount) {
    body(std::integral_constant<int, i>{});
    each<kCount, i + 1>(body);
  }
}

}  // namespace qk
