// What attention multiplies on an ISA without units for narrow numbers: words of one fp32 number
// each. Codes are integers and their sums stay below 2^24, so they are exact.
//
// A family of words says how many elements of the summed dimension a word of 32 bits holds
// (kDepth), how words are made, and how they are multiplied:
//   Keys    words of queries and of keys, from int8 codes with scales (kScaled) or from numbers in
//           16 bit; kOffset is what is added to keys' codes
//   Values  words of weights and of values, from numbers; 2^kShift is the weight 1
#pragma once

#include "cpu/numeric.inl"

namespace qk::QK_ISA {
namespace {

QK_INLINE I32 load_words(const float* p) { return bits(load(p, Full{})); }
QK_INLINE void store_words(float* p, I32 words) { store(p, from_bits(words), Full{}); }

inline float sum_of(F32 x) {
  float lanes[kLanes];
  store(lanes, x, Full{});
  for (int n = kLanes / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
  }
  return lanes[0];
}

struct FloatSums {
  using Sum = F32;
  static QK_INLINE Sum add(Sum sum, const float* a, I32 b) {
    return multiply_add(broadcast(*a), from_bits(b), sum);
  }
  static QK_INLINE F32 number(Sum sum) { return sum; }
};

struct FloatKeys : FloatSums {
  static constexpr bool kScaled = true;
  static constexpr int kDepth = 1, kOffset = 0;
  static QK_INLINE Sum start(int) { return broadcast(0.0f); }
  static QK_INLINE void store_keys(float* row, int64_t i, I32 codes) {
    store(row + i, to_float(codes), Full{});
  }
  static QK_INLINE void store_queries(float* row, int64_t i, I32 codes) {
    store(row + i, to_float(codes), Full{});
  }
};

struct FloatKeys16 : FloatSums {
  static constexpr bool kScaled = false;
  static constexpr int kDepth = 1;
  static QK_INLINE Sum start(int) { return broadcast(0.0f); }
  static QK_INLINE void store(float* row, int64_t i, F32 x) {
    QK_ISA::store(row + i, round_to(x, BFloat16{}), Full{});
  }
};

struct RoundToBFloat16 {
  static constexpr float kShift = 0.0f;
  QK_INLINE F32 operator()(F32 x) const { return round_to(x, BFloat16{}); }
};
struct RoundToInteger {
  static constexpr float kShift = 6.9886847f;  // log2(127)
  QK_INLINE F32 operator()(F32 x) const { return to_float(round(x)); }
};

template <class Round>
struct FloatValues : FloatSums {
  static constexpr int kDepth = 1;
  static constexpr float kShift = Round::kShift;
  static QK_INLINE Sum zero() { return broadcast(0.0f); }
  static QK_INLINE I32 word(const F32* tokens) { return bits(Round()(tokens[0])); }
  // Weights of 32 keys from key i on, and onto `total` what they are as stored.
  using Total = F32;
  static QK_INLINE Total weights(float* row, int64_t i, F32 a, F32 b, Total total) {
    a = Round()(a);
    b = Round()(b);
    store(row + i, a, Full{});
    store(row + i + kLanes, b, Full{});
    return total + (a + b);
  }
  static QK_INLINE float total(Total x) { return sum_of(x); }
};

}  // namespace
}  // namespace qk::QK_ISA
