// See gram.h. An ISA's file says what a tile in registers is: kRows rows of kVectors vectors. Its
// Words are one fp32 number each; an ISA with units for pairs of bf16 numbers defines PairWords.
#pragma once

#include "cpu/gram.h"
#include "cpu/numeric.inl"

namespace qk::QK_ISA {
namespace {

constexpr int kWidth = kVectors * kLanes;

struct FloatWords {
  using Word = float;
  static constexpr int kTokens = 1;  // of a word
  static QK_INLINE F32 add(F32 sum, const Word* a, F32 b) {
    return multiply_add(broadcast(*a), b, sum);
  }
  static QK_INLINE F32 load_vector(const Word* p) { return load(p, Full{}); }
  static QK_INLINE void store_words(Word* p, const F32* tokens) { store(p, *tokens, Full{}); }
};

// Of 16 columns: least, greatest, sum of magnitudes. NaN shows in the sum alone.
struct Channels {
  F32 low, high, sum;
  QK_INLINE void add(F32 x) {
    low = min(low, x);
    high = max(high, x);
    sum = sum + magnitude(x);
  }
};

// x onto what is there, NaN wherever the sum is.
template <class Lanes>
QK_INLINE void store_channels(const Channels& x, int64_t cols, float* out, Lanes lanes) {
  const F32 sum = load(out + 2 * cols, lanes) + x.sum;
  const Mask nan = is_nan(sum);
  const F32 low = min(load(out, lanes), x.low), high = max(load(out + cols, lanes), x.high);
  store(out, from_bits(select(nan, bits(sum), bits(low))), lanes);
  store(out + cols, from_bits(select(nan, bits(sum), bits(high))), lanes);
  store(out + 2 * cols, sum, lanes);
}

template <class Words, bool kChannels, class T, class Lanes>
QK_INLINE void pack_vector(const GramInput& input, int64_t begin, int64_t end, int64_t first,
                           typename Words::Word* packed, float* out, Lanes lanes) {
  const T* const x = static_cast<const T*>(input.x) + first;
  const F32 infinite = from_bits(broadcast(0x7f800000)), zero = broadcast(0.0f);
  Channels channels = {infinite, zero - infinite, zero};
  for (int64_t t = begin; t < end; t += Words::kTokens, packed += kWidth) {
    F32 tokens[Words::kTokens];
#pragma GCC unroll 2
    for (int i = 0; i < Words::kTokens; ++i) {
      tokens[i] = zero;
      if (t + i < end) {
        tokens[i] = load(x + input.tokens[t + i] * input.stride, lanes);
        if constexpr (kChannels) channels.add(tokens[i]);
      }
    }
    Words::store_words(packed, tokens);
  }
  if constexpr (kChannels) store_channels(channels, input.cols, out + first, lanes);
}

template <class Words, class T>
void pack_stripe(const GramInput& input, int64_t begin, int64_t end, int64_t first, void* packed,
                 float* channels) {
  auto* const words = static_cast<typename Words::Word*>(packed);
  const auto pack = [&](int64_t c, auto lanes) {
    if (channels) {
      pack_vector<Words, true, T>(input, begin, end, first + c, words + c, channels, lanes);
    } else {
      pack_vector<Words, false, T>(input, begin, end, first + c, words + c, nullptr, lanes);
    }
  };
  for (int64_t c = 0; c < kWidth; c += kLanes) {
    const int64_t left = input.cols - first - c;
    if (left >= kLanes) {
      pack(c, Full{});
    } else if (left > 0) {
      pack(c, Part(left));
    } else {
      for (int64_t t = begin, word = 0; t < end; t += Words::kTokens, ++word) {
        for (int i = 0; i < kLanes; ++i) words[word * kWidth + c + i] = 0;
      }
    }
  }
}

// One tile: rows `row`..., columns `first`... of g, whose numbers count as zeros if it is fresh.
template <class Words>
QK_INLINE void gram_tile(const typename Words::Word* a, const typename Words::Word* b,
                         int64_t depth, int64_t row, int64_t first, int64_t cols, bool fresh,
                         float* g) {
  F32 sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[i][v] = broadcast(0.0f);
  }
  // g is far apart from row to row, which no hardware foresees, and seldom in a cache.
  for (int i = 0; i < kRows && row + i < cols; ++i) {
    const float* const out = g + (row + i) * cols + first;
    for (int v = 0; v < kVectors; ++v) __builtin_prefetch(out + v * kLanes, 1);
  }
  for (int64_t k = 0; k < depth; ++k) {
    decltype(Words::load_vector(b)) right[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) right[v] = Words::load_vector(b + k * kWidth + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        sum[i][v] = Words::add(sum[i][v], a + k * kWidth + i, right[v]);
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
      const auto put = [&](auto lanes) {
        store(p, (fresh ? broadcast(0.0f) : load(p, lanes)) + sum[i][v], lanes);
      };
      if (left >= kLanes) {
        put(Full{});
      } else if (left > 0) {
        put(Part(left));
      }
    }
  }
}

template <class Words>
void gram_stripe(const void* packed, int64_t stripe, int64_t tokens, int64_t first, int64_t cols,
                 bool fresh, float* g) {
  const int64_t depth = (tokens + Words::kTokens - 1) / Words::kTokens;
  const int64_t end = first + kWidth < cols ? first + kWidth : cols;
  const auto* const words = static_cast<const typename Words::Word*>(packed);
  for (int64_t row = 0; row < end; row += kRows) {
    gram_tile<Words>(words + row / kWidth * stripe + row % kWidth, words + first / kWidth * stripe,
                     depth, row, first, cols, fresh, g);
  }
}

}  // namespace
}  // namespace qk::QK_ISA
