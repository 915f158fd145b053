// See attention.h. An ISA's file says what a tile in registers is, kRows rows of kVectors vectors,
// and which words it multiplies: Keys8, Keys16, Values16 and Values8 (attention_words.h).
#pragma once

#include "cpu/attention_pack_impl.h"
#include "cpu/exp2.inl"

namespace qk::QK_ISA {
namespace {

static_assert(kQueryBlock % kRows == 0 && kQueryBlock % kScaleBlock == 0);
static_assert(kKeyBlock % (2 * kLanes) == 0 && kKeyBlock % kScaleBlock == 0);

// sum[r][v] += a[r] * b[v], summed over `depth` words; rows of a are kStride words apart.
template <class Words, int kStride, int kCols>
QK_INLINE void multiply(const float* a, const float* b, int64_t vector_stride, int64_t depth_stride,
                        int64_t depth, typename Words::Sum (&sum)[kRows][kCols]) {
  for (int64_t k = 0; k < depth; ++k) {
    I32 right[kCols];
#pragma GCC unroll 4
    for (int v = 0; v < kCols; ++v) right[v] = load_words(b + v * vector_stride + k * depth_stride);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kCols; ++v) {
        sum[r][v] = Words::add(sum[r][v], a + r * kStride + k, right[v]);
      }
    }
  }
}

// ---- one head's block of queries ----
struct Scratch {
  float* queries;                // [kQueryBlock][kQueryStride of the keys], words
  float* sums;                   // [kQueryBlock][size]
  float* logits;                 // [kRows][kKeyBlock], without the queries' scale
  float* weights;                // [kRows][kKeyBlock], words
  float *factor, *peak, *total;  // [kQueryBlock]
  int32_t* code_sum;             // [kQueryBlock]
  uint8_t* bad;                  // [kQueryBlock]
};

template <class Keys>
constexpr int kQueryStride = kMaxHeadSize / Keys::kDepth;

// Queries as codes, with scales of their own.
template <class T>
void quantize_queries(const AttentionQueries& queries, int64_t first, int64_t rows,
                      const Scratch& s) {
  const int64_t size = queries.size;
  const auto row = [&](int64_t r) {
    return static_cast<const T*>(queries.q) + (first + r) * queries.q_stride;
  };
  float amax[kQueryBlock] = {};
  for (int64_t r = 0; r < rows; ++r) {
    s.bad[r] = !is_finite(row(r), size);
    if (s.bad[r]) continue;
    F32 most = broadcast(0.0f);
    for (int64_t i = 0; i < size; i += kLanes)
      most = max(most, magnitude(load(row(r) + i, Full{})));
    amax[r] = largest_of(most);
  }
  if (!queries.per_token) {
    for (int64_t b = 0; b < kQueryBlock; b += kScaleBlock) {
      const float most = *std::max_element(amax + b, amax + b + kScaleBlock);
      std::fill(amax + b, amax + b + kScaleBlock, most);
    }
  }
  const int64_t padded = (rows + kRows - 1) / kRows * kRows;
  for (int64_t r = 0; r < padded; ++r) {
    const bool counted = r < rows && !s.bad[r];
    const float scale = code_scale(amax[r]);
    const F32 inverse = broadcast(1.0f / scale);
    I32 sum = broadcast(0);
    for (int64_t i = 0; i < size; i += kLanes) {
      const I32 code = counted ? code_of(load(row(r) + i, Full{}), inverse) : broadcast(0);
      Keys8::store_queries(s.queries + r * kQueryStride<Keys8>, i, code);
      sum = sum + code;
    }
    s.code_sum[r] = static_cast<int32_t>(sum_of(to_float(sum)));  // at most 127 * 512: exact
    s.factor[r] = scale * queries.scale;
  }
}

// Queries in 16 bit.
template <class T>
void round_queries(const AttentionQueries& queries, int64_t first, int64_t rows, const Scratch& s) {
  for (int64_t r = 0; r < (rows + kRows - 1) / kRows * kRows; ++r) {
    const T* const row = static_cast<const T*>(queries.q) + (first + r) * queries.q_stride;
    s.bad[r] = r < rows && !is_finite(row, queries.size);
    const bool counted = r < rows && !s.bad[r];
    for (int64_t i = 0; i < queries.size; i += kLanes) {
      Keys16::store(s.queries + r * kQueryStride<Keys16>, i,
                    counted ? load(row + i, Full{}) : broadcast(0.0f));
    }
    s.code_sum[r] = 0;
    s.factor[r] = queries.scale;
  }
}

// Logits of kCols vectors of keys; `most` takes in the rows' largest.
template <class Keys, int kCols>
QK_INLINE void logits_tile(const Scratch& s, int64_t row, const float* keys, const float* key_scale,
                           int64_t words, int64_t first, F32 (&most)[kRows]) {
  typename Keys::Sum sum[kRows][kCols];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kCols; ++v) sum[r][v] = Keys::start(s.code_sum[row + r]);
  }
  multiply<Keys, kQueryStride<Keys>, kCols>(s.queries + row * kQueryStride<Keys>, keys,
                                            words * kLanes, kLanes, words, sum);
#pragma GCC unroll 4
  for (int v = 0; v < kCols; ++v) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      F32 logit = Keys::number(sum[r][v]);
      if constexpr (Keys::kScaled) logit = logit * load(key_scale + v * kLanes, Full{});
      store(s.logits + r * kKeyBlock + first + v * kLanes, logit, Full{});
      most[r] = max(most[r], logit);
    }
  }
}

// sums = sums * decay + weights * values, kCols vectors of channels.
template <class Values, int kCols>
QK_INLINE void values_tile(const Scratch& s, int64_t row, const float* values, int64_t size,
                           int64_t keys, int64_t channel, const float* decay) {
  typename Values::Sum sum[kRows][kCols];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kCols; ++v) sum[r][v] = Values::zero();
  }
  multiply<Values, kKeyBlock / Values::kDepth, kCols>(s.weights, values + channel, kLanes, size,
                                                      keys / Values::kDepth, sum);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    float* const out = s.sums + (row + r) * size + channel;
    const F32 kept = broadcast(decay[r]);
#pragma GCC unroll 4
    for (int v = 0; v < kCols; ++v) {
      const F32 old = load(out + v * kLanes, Full{});
      store(out + v * kLanes, multiply_add(old, kept, Values::number(sum[r][v])), Full{});
    }
  }
}

template <class Values>
inline void add_values(const Scratch& s, int64_t row, const float* values, int64_t size,
                       int64_t keys, const float* decay) {
  for (int64_t channel = 0; channel < size;) {
    const int64_t left = (size - channel) / kLanes;
    if constexpr (kVectors >= 4) {
      if (left == 4 || left >= 6) {
        values_tile<Values, 4>(s, row, values, size, keys, channel, decay);
        channel += 4 * kLanes;
        continue;
      }
      if (left == 3 || left == 5) {
        values_tile<Values, 3>(s, row, values, size, keys, channel, decay);
        channel += 3 * kLanes;
        continue;
      }
      if (left == 2) {
        values_tile<Values, 2>(s, row, values, size, keys, channel, decay);
        channel += 2 * kLanes;
        continue;
      }
    }
    values_tile<Values, 1>(s, row, values, size, keys, channel, decay);
    channel += kLanes;
  }
}

// Keys that a row sees, as [begin, end) of a block's.
struct Seen {
  int64_t begin, end;
};

inline Seen seen_keys(const AttentionQueries& queries, int64_t t, int64_t base, int64_t keys) {
  const int64_t position = t + queries.shift;
  const int64_t begin = std::max(queries.begin, position - queries.window) - base;
  const int64_t end = (queries.causal ? std::min(queries.end, position) : queries.end) - base;
  return {std::clamp<int64_t>(begin, 0, keys), std::clamp<int64_t>(end, 0, keys)};
}

// Rows [row, row + kRows) of the block of queries from `first` on go over one block of keys.
template <class Keys, class Values>
void attend_tile(const AttentionQueries& queries, const AttentionPacked& packed, int64_t first,
                 int64_t row, int64_t rows, int64_t base, const Scratch& s) {
  const int64_t last = std::min(row + kRows, rows) - 1, size = queries.size;
  const Seen low = seen_keys(queries, first + row, base, kKeyBlock);
  const Seen high = seen_keys(queries, first + last, base, kKeyBlock);
  if (low.begin >= high.end) return;
  const int64_t keys = (high.end + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes);
  const int64_t words = size / Keys::kDepth;
  const float* const packed_keys = static_cast<const float*>(packed.keys) + base * words;
  const float* const key_scale = Keys::kScaled ? packed.key_scale + base : nullptr;

  F32 most[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) most[r] = broadcast(-kInfinity);
  for (int64_t j = 0; j < keys;) {
    if (kVectors >= 4 && j + 4 * kLanes <= keys) {
      logits_tile<Keys, kVectors>(s, row, packed_keys + j * words, key_scale + j, words, j, most);
      j += kVectors * kLanes;
    } else {
      constexpr int kFew = kVectors >= 2 ? 2 : 1;
      logits_tile<Keys, kFew>(s, row, packed_keys + j * words, key_scale + j, words, j, most);
      j += kFew * kLanes;
    }
  }
  if (high.begin > 0 || low.end < keys) {
    for (int r = 0; r < kRows; ++r) {
      const Seen seen = seen_keys(queries, first + std::min(row + r, last), base, keys);
      float* const logits = s.logits + r * kKeyBlock;
      std::fill(logits, logits + std::min(seen.begin, keys), -kInfinity);
      std::fill(logits + seen.end, logits + keys, -kInfinity);
      most[r] = broadcast(-kInfinity);
      for (int64_t j = 0; j < keys; j += kLanes) most[r] = max(most[r], load(logits + j, Full{}));
    }
  }

  // Where nothing is seen yet, any finite peak leaves zeros.
  float peaks[kLanes] = {}, change[kLanes] = {}, decay[kLanes];
  for (int r = 0; r < kRows; ++r) {
    const float old = s.peak[row + r];
    const float peak = std::max(old, largest_of(most[r]) * s.factor[row + r]);
    peaks[r] = peak == -kInfinity ? 0.0f : peak;
    change[r] = old - peaks[r];
    s.peak[row + r] = peak;
  }
  store(decay, exp2(load(change, Full{})), Full{});
  for (int r = 0; r < kRows; ++r) {
    const F32 factor = broadcast(s.factor[row + r]), shift = broadcast(Values::kShift - peaks[r]);
    const float* const logits = s.logits + r * kKeyBlock;
    float* const weights = s.weights + r * (kKeyBlock / Values::kDepth);
    typename Values::Total total = Values::zero();
    for (int64_t j = 0; j < keys; j += 2 * kLanes) {
      const F32 a = exp2(multiply_add(load(logits + j, Full{}), factor, shift));
      const F32 b = exp2(multiply_add(load(logits + j + kLanes, Full{}), factor, shift));
      total = Values::weights(weights, j, a, b, total);
    }
    s.total[row + r] = s.total[row + r] * decay[r] + Values::total(total);
  }
  const float* const values =
      static_cast<const float*>(packed.values) + base / Values::kDepth * size;
  add_values<Values>(s, row, values, size, keys, decay);
}

template <class T>
void finish_row(const AttentionQueries& queries, const AttentionPacked& packed, int64_t t,
                int64_t r, const Scratch& s) {
  const int64_t size = queries.size;
  T* const out = static_cast<T*>(queries.out) + t * queries.out_stride;
  const Seen seen = seen_keys(queries, t, 0, queries.end);
  float factor = 0.0f;
  if (seen.begin < seen.end) {
    const bool poisoned = s.bad[r] || !(s.peak[r] < kInfinity && s.factor[r] < kInfinity) ||
                          (packed.bad && std::any_of(packed.bad + seen.begin, packed.bad + seen.end,
                                                     [](uint8_t bad) { return bad != 0; }));
    factor = poisoned ? std::numeric_limits<float>::quiet_NaN() : 1.0f / s.total[r];
  }
  for (int64_t i = 0; i < size; i += kLanes) {
    F32 x = load(s.sums + r * size + i, Full{}) * broadcast(factor);
    if (packed.value_scale) x = x * load(packed.value_scale + i, Full{});
    store(out + i, x, Full{});
  }
}

template <class Keys, class Values, class T>
void attend_block(const AttentionQueries& queries, const AttentionPacked& packed, int64_t first,
                  const Scratch& s) {
  const int64_t rows = std::min(kQueryBlock, queries.tokens - first);
  if constexpr (Keys::kScaled) {
    quantize_queries<T>(queries, first, rows, s);
  } else {
    round_queries<T>(queries, first, rows, s);
  }
  std::fill(s.peak, s.peak + kQueryBlock, -kInfinity);
  std::fill(s.total, s.total + kQueryBlock, 0.0f);
  std::fill(s.sums, s.sums + (rows + kRows - 1) / kRows * kRows * queries.size, 0.0f);
  const int64_t begin = seen_keys(queries, first, 0, queries.end).begin;
  const int64_t end = seen_keys(queries, first + rows - 1, 0, queries.end).end;
  for (int64_t base = begin / kKeyBlock * kKeyBlock; base < end; base += kKeyBlock) {
    for (int64_t row = 0; row < rows; row += kRows) {
      attend_tile<Keys, Values>(queries, packed, first, row, rows, base, s);
    }
  }
  for (int64_t r = 0; r < rows; ++r) finish_row<T>(queries, packed, first + r, r, s);
}

}  // namespace
}  // namespace qk::QK_ISA
