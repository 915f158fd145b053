// See histogram.h. The places of a piece go to the L1 cache first: finding them is vector work,
// counting is not.
#pragma once

#include "cpu/histogram.h"
#include "cpu/numeric.inl"

namespace qk::QK_ISA {
namespace {

template <class T>
void count_values(const T* x, int64_t n, float bins, uint32_t* even, uint32_t* odd) {
  constexpr int64_t kPiece = 512;
  alignas(64) float places[kPiece];  // integers, as bits
  const F32 per_unit = broadcast(bins), nothing = broadcast(0.0f);
  for (int64_t begin = 0; begin < n; begin += kPiece) {
    const int64_t count = n - begin < kPiece ? n - begin : kPiece;
    for_lanes(count, [&](int64_t i, auto lanes) {
      // -0 is a zero like the other one: the addition takes its sign away.
      const F32 value = load(x + begin + i, lanes) + nothing;
      const I32 size = truncate(magnitude(value) * per_unit);
      const I32 above = size + broadcast(kHistogramBins / 2);
      const I32 below = broadcast(kHistogramBins / 2 - 1) - size;
      const I32 sign = bits(value) & broadcast(INT32_MIN);
      store(places + i, from_bits(select(equal(sign, broadcast(0)), above, below)), Full{});
    });
    int64_t i = 0;
    for (; i + 2 <= count; i += 2) {
      int32_t pair[2];
      std::memcpy(pair, places + i, sizeof(pair));
      ++even[pair[0]];
      ++odd[pair[1]];
    }
    if (i < count) {
      int32_t last;
      std::memcpy(&last, places + i, sizeof(last));
      ++even[last];
    }
  }
}

}  // namespace
}  // namespace qk::QK_ISA
