// What the sweep of gptq.h reads: its words, panels of rows, and the factor. An ISA's file says how
// many vectors of rows and how many columns a tile in registers has: kVectors, kColumns.
#pragma once

#include <type_traits>

#include "cpu/gptq.h"
#include "cpu/numeric.inl"
#include "cpu/transpose.inl"

namespace qk::QK_ISA {
namespace {

constexpr int kPanel = kVectors * kLanes;
constexpr int64_t kDepth = 128;  // so many words of a panel stay in the L1 cache

// The words that a tile takes: one number each, or, where the ISA has units for it, a pair of bf16
// numbers of an even column and the one after it. As bits, words are kept among the numbers.
struct FloatWords {
  static constexpr int kNumbers = 1;
  static QK_INLINE F32 word(F32, F32 x) { return x; }
  static QK_INLINE F32 add(F32 sum, F32 a, F32 b) { return multiply_add(a, b, sum); }
};
#ifndef QK_PAIRS
using PairWords = FloatWords;  // never used
constexpr bool kPairs = false;
#else
constexpr bool kPairs = true;
#endif

bool load_rows(const float* w, int64_t stride, int64_t cols, int64_t rows, float* values) {
  F32 residue = broadcast(0.0f);  // x - x is zero unless x is infinite or NaN
  for (int64_t c = 0; c < cols; c += kLanes) {
    const int64_t n = cols - c < kLanes ? cols - c : kLanes;
    for (int64_t v = 0; v < kPanel; v += kLanes) {
      float* const out = values + c * kPanel + v;
      if (n == kLanes && rows - v >= kLanes) {
        transpose(w + v * stride + c, stride, out, kPanel);
      } else {
        for (int64_t r = 0; r < kLanes; ++r) {
          for (int64_t i = 0; i < n; ++i) {
            out[i * kPanel + r] = v + r < rows ? w[(v + r) * stride + c + i] : 0.0f;
          }
        }
      }
      for (int64_t i = 0; i < n; ++i) {
        const F32 x = load(out + i * kPanel, Full{});
        residue = residue + (x - x);
      }
    }
  }
  float left[kLanes], sum = 0.0f;
  store(left, residue, Full{});
  for (float x : left) sum += x;
  return sum == 0.0f;
}

// The stripe's columns in whole tiles.
QK_INLINE int64_t tiled(int64_t width) { return (width + kColumns - 1) / kColumns * kColumns; }

// The stripe's own rows in a tile that begins with column c, as a place in its factor.
QK_INLINE int64_t own_place(const GptqStripe& stripe, int64_t c) {
  return stripe.before() * tiled(stripe.width) + c * stripe.own;
}
// Words [begin, end), a block, in the same tile.
QK_INLINE int64_t block_place(const GptqStripe& stripe, int64_t begin, int64_t end, int64_t c) {
  return begin * tiled(stripe.width) + c * (end - begin);
}
QK_INLINE const float* own_rows(const GptqStripe& stripe, int64_t c) {
  return stripe.factor + own_place(stripe, c);
}

void pack_factor(const GptqStripe& stripe, const float* factor, int64_t stride, int64_t begin,
                 int64_t end, float* packed) {
  constexpr int64_t kAtOnce = 8 * kColumns;  // so many columns of a row are read at once
  const int64_t first = stripe.first, width = stripe.width, before = stripe.before();
  const Part all(kColumns);
  for (int64_t from = 0; from < width; from += kAtOnce) {
    const int64_t to = width - from < kAtOnce ? width : from + kAtOnce;
    // A division, not a product with the inverse: the bits are those of the CUDA kernel.
    float diagonal[kAtOnce + kLanes];
    for (int64_t c = 0; c < kAtOnce + kLanes; ++c) {
      diagonal[c] = c < to - from ? stripe.diagonal[from + c] : 1.0f;
    }
    // Of row k, or of rows k and k + 1, the word that is at `place` in tile 0, `next` from one
    // column to the next.
    const auto pack = [&](int64_t place, int64_t next, int64_t k, auto paired) {
      for (int64_t c = from; c < to; c += kColumns) {
        const Part lanes(to - c < kColumns ? to - c : kColumns);
        const F32 over = load(diagonal + (c - from), Full{});
        const float* const x = factor + k * stride + first + c;
        const F32 one = load(x, lanes) / over;
        if constexpr (paired) {
          store(packed + place + c * next, PairWords::word(one, load(x + stride, lanes) / over),
                all);
        } else {
          store(packed + place + c * next, one, all);
        }
      }
    };
    const auto pack_before = [&](int64_t word, int64_t k, auto paired) {
      const int64_t block = word / kDepth * kDepth;
      const int64_t depth = before - block < kDepth ? before - block : kDepth;
      pack(block_place(stripe, block, block + depth, 0) + (word - block) * kColumns, depth, k,
           paired);
    };
    const int64_t own = own_place(stripe, 0);
    int64_t k = begin;
    for (; k < end && k < stripe.far; k += 2) pack_before(k / 2, k, std::true_type{});
    for (; k < end && k < first; ++k) pack_before(k - stripe.far / 2, k, std::false_type{});
    for (; k < end; ++k) pack(own + (k - first) * kColumns, stripe.own, k, std::false_type{});
    if (end < first + width) continue;
    for (int64_t word = 0; word < stripe.own - width; ++word) {
      pack(own + (width + word) * kColumns, stripe.own, first + 2 * word, std::true_type{});
    }
  }
}

}  // namespace
}  // namespace qk::QK_ISA
