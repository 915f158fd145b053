// See gram.h. An ISA's file says what a tile in registers is: kRows rows of kVectors vectors. Its
// Words are one fp32 number each; an ISA with units for pairs of bf16 numbers defines PairWords.
#pragma once

#include "cpu/gram.h"
#include "cpu/numeric.inl"

namespace qk::QK_ISA {
namespace {

struct FloatWords {
  using Word = float;
  static constexpr int kTokens = 1;  // of a word
  static QK_INLINE F32 add(F32 sum, const Word* a, F32 b) {
    return multiply_add(broadcast(*a), b, sum);
  }
  static QK_INLINE F32 load_vector(const Word* p) { return load(p, Full{}); }
};

template <class T>
void pack_floats(const T* x, int64_t stride, int64_t tokens, int64_t first, int64_t cols,
                 float* packed) {
  const int64_t n = cols - first < kLanes ? cols - first : kLanes;
  for (int64_t t = 0; t < tokens; ++t) {
    const T* row = x + t * stride + first;
    store(packed + t * kLanes, n == kLanes ? load(row, Full{}) : load(row, Part(n)), Full{});
  }
}

// One tile: rows `row`..., columns `first`... of g.
template <class Words>
QK_INLINE void gram_tile(const typename Words::Word* packed, int64_t panel, int64_t depth,
                         int64_t row, int64_t first, int64_t cols, float* g) {
  const auto* a = packed + row / kLanes * panel + row % kLanes;
  const auto* b = packed + first / kLanes * panel;
  F32 sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[i][v] = broadcast(0.0f);
  }
  for (int64_t k = 0; k < depth; ++k) {
    decltype(Words::load_vector(b)) right[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) right[v] = Words::load_vector(b + v * panel + k * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        sum[i][v] = Words::add(sum[i][v], a + k * kLanes + i, right[v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    if (row + i >= cols) break;
    float* const out = g + (row + i) * cols + first;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int64_t left = cols - first - v * kLanes;
      float* const p = out + v * kLanes;
      if (left >= kLanes) {
        store(p, load(p, Full{}) + sum[i][v], Full{});
      } else if (left > 0) {
        store(p, load(p, Part(left)) + sum[i][v], Part(left));
      }
    }
  }
}

template <class Words>
void gram_stripe(const void* packed, int64_t panel, int64_t tokens, int64_t first, int64_t cols,
                 float* g) {
  const int64_t depth = (tokens + Words::kTokens - 1) / Words::kTokens;
  const int64_t end = first + kVectors * kLanes < cols ? first + kVectors * kLanes : cols;
  for (int64_t row = 0; row < end; row += kRows) {
    gram_tile<Words>(static_cast<const typename Words::Word*>(packed), panel, depth, row, first,
                     cols, g);
  }
}

}  // namespace
}  // namespace qk::QK_ISA
