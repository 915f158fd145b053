// See kv_cache.h. Codes become fp32 numbers, 16 at a time, and all arithmetic is fp32. An ISA's
// file may have faster ways (QK_CODES) to decode and to sum up lanes.
#pragma once

#include <algorithm>
#include <limits>

#include "cpu/exp2.inl"
#include "cpu/kv_cache.h"

namespace qk::QK_ISA {
namespace {

// Any code, NaN too.
template <class Format>
struct AnyCodes {
  static constexpr float kUnit = 1.0f;  // what a number has to be multiplied by
  static QK_INLINE F32 load_codes(const uint8_t* p) {
    return decode(load_signed(p, Full{}), Format{});
  }
};

#ifndef QK_CODES
template <class Format>
using FastCodes = AnyCodes<Format>;
constexpr bool kFastLosesNan = false;
QK_INLINE bool any_nan(const uint8_t*, int64_t) { return false; }

// The sums of the lanes of 16 vectors.
QK_INLINE F32 sums_of_lanes(const F32* x) {
  float sums[kLanes];
  for (int j = 0; j < kLanes; ++j) {
    float lanes[kLanes];
    store(lanes, x[j], Full{});
    for (int n = kLanes / 2; n > 0; n /= 2) {
      for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
    }
    sums[j] = lanes[0];
  }
  return load(sums, Full{});
}
#endif

// Keys ahead of which codes are fetched: the memory's latency at the rate it gives them.
constexpr int64_t kAhead = 48;

QK_INLINE void prefetch_row(const uint8_t* row, int64_t size) {
  for (int64_t i = 0; i < size; i += 64) __builtin_prefetch(row + i);
}

// Products of kRows queries with keys [first, first + 16) or as many as there are before `end`.
template <class Codes, int kRows>
QK_INLINE void key_products(const CacheHead& head, const float* q, int64_t begin, int64_t first,
                            int64_t end, F32 (&products)[kRows]) {
  constexpr int kKeys = 4;  // at a time
  F32 lanes[kRows][kLanes];
  for (int j = 0; j < kLanes; j += kKeys) {
    const uint8_t* rows[kKeys];
    // Beyond the end the last key is taken again: nothing there is read.
    for (int i = 0; i < kKeys; ++i) {
      rows[i] = head.k + std::min(first + j + i, end - 1) * head.k_stride;
      // After the last keys come the first values.
      const int64_t ahead = first + j + i + kAhead;
      prefetch_row(ahead < end ? head.k + ahead * head.k_stride
                               : head.v + (begin + ahead - end) * head.v_stride,
                   head.size);
    }
    F32 sum[kRows][kKeys];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < kKeys; ++i) sum[r][i] = broadcast(0.0f);
    }
    for (int64_t d = 0; d < head.size; d += kLanes) {
      F32 key[kKeys];
#pragma GCC unroll 4
      for (int i = 0; i < kKeys; ++i) key[i] = Codes::load_codes(rows[i] + d);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const F32 query = load(q + r * head.size + d, Full{});
#pragma GCC unroll 4
        for (int i = 0; i < kKeys; ++i) sum[r][i] = multiply_add(query, key[i], sum[r][i]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < kKeys; ++i) lanes[r][j + i] = sum[r][i];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) products[r] = sums_of_lanes(lanes[r]);
}

// Sums of kCols vectors of channels over keys [begin, end) with weights [kRows][kCacheChunk].
template <class Codes, int kRows, int kCols>
QK_INLINE void value_sums(const CacheHead& head, const float* weights, int64_t begin, int64_t end,
                          int64_t channel, float* parts, int64_t part_stride) {
  F32 sum[kRows][kCols];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kCols; ++c) sum[r][c] = broadcast(0.0f);
  }
  const uint8_t* row = head.v + begin * head.v_stride + channel;
  for (int64_t j = begin; j < end; ++j, ++weights, row += head.v_stride) {
    for (int64_t i = 0; i < kCols * kLanes; i += 64) {
      __builtin_prefetch(row + kAhead * head.v_stride + i);
    }
#pragma GCC unroll 8
    for (int c = 0; c < kCols; ++c) {
      const F32 value = Codes::load_codes(row + c * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        sum[r][c] = multiply_add(broadcast(weights[r * kCacheChunk]), value, sum[r][c]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kCols; ++c) {
      store(parts + r * part_stride + kCacheSums + channel + c * kLanes,
            sum[r][c] * broadcast(Codes::kUnit), Full{});
    }
  }
}

template <class Codes, int kRows>
void attend_rows(const CacheHead& head, const float* q, float factor, int64_t begin, int64_t end,
                 float* parts, int64_t part_stride) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  alignas(64) float logits[kRows * kCacheChunk];
  const int64_t keys = end - begin;
  const float unit = factor * Codes::kUnit;
  // Per-key scales past the end are not read either.
  const auto scales = [&](const float* scale, int64_t stride, int64_t j) {
    if (stride == 0) return broadcast(*scale);
    return keys - j >= kLanes ? load(scale + begin + j, Full{})
                              : load(scale + begin + j, Part(keys - j));
  };
  F32 most[kRows];
  for (int r = 0; r < kRows; ++r) most[r] = broadcast(-kInfinity);
  for (int64_t j = 0; j < keys; j += kLanes) {
    F32 products[kRows];
    key_products<Codes, kRows>(head, q, begin, begin + j, end, products);
    const F32 scale = scales(head.k_scale, head.k_scale_stride, j) * broadcast(unit);
    for (int r = 0; r < kRows; ++r) {
      float* const to = logits + r * kCacheChunk + j;
      store(to, products[r] * scale, Full{});
      if (keys - j < kLanes) std::fill(to + (keys - j), to + kLanes, -kInfinity);
      most[r] = max(most[r], load(to, Full{}));
    }
  }
  for (int r = 0; r < kRows; ++r) {
    float lanes[kLanes];
    store(lanes, most[r], Full{});
    const float peak = *std::max_element(lanes, lanes + kLanes);
    const F32 shift = broadcast(peak == -kInfinity ? 0.0f : peak);
    F32 total = broadcast(0.0f);
    for (int64_t j = 0; j < keys; j += kLanes) {
      float* const at = logits + r * kCacheChunk + j;
      const F32 weight = exp2(load(at, Full{}) - shift);
      total = total + weight;
      store(at,
            head.v_scale_stride ? weight * scales(head.v_scale, head.v_scale_stride, j) : weight,
            Full{});
    }
    store(lanes, total, Full{});
    for (int n = kLanes / 2; n > 0; n /= 2) {
      for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
    }
    parts[r * part_stride] = peak;
    parts[r * part_stride + 1] = lanes[0];
  }
  constexpr int kMany = kRows <= 2 ? 8 : 4;
  int64_t channel = 0;
  for (; channel + kMany * kLanes <= head.size; channel += kMany * kLanes) {
    value_sums<Codes, kRows, kMany>(head, logits, begin, end, channel, parts, part_stride);
  }
  for (; channel < head.size; channel += kLanes) {
    value_sums<Codes, kRows, 1>(head, logits, begin, end, channel, parts, part_stride);
  }
  if (!head.v_scale_stride) {
    for (int r = 0; r < kRows; ++r) {
      float* const sums = parts + r * part_stride + kCacheSums;
      for (int64_t i = 0; i < head.size; i += kLanes) {
        store(sums + i, load(sums + i, Full{}) * broadcast(*head.v_scale), Full{});
      }
    }
  }
}

template <class Codes>
void attend_codes(const CacheHead& head, const float* q, int rows, float factor, int64_t begin,
                  int64_t end, float* parts, int64_t part_stride) {
  switch (rows) {
    case 1:
      return attend_rows<Codes, 1>(head, q, factor, begin, end, parts, part_stride);
    case 2:
      return attend_rows<Codes, 2>(head, q, factor, begin, end, parts, part_stride);
    case 3:
      return attend_rows<Codes, 3>(head, q, factor, begin, end, parts, part_stride);
    default:
      return attend_rows<Codes, 4>(head, q, factor, begin, end, parts, part_stride);
  }
}

template <class T>
void merge_parts(const float* parts, int64_t n, int64_t size, T* out) {
  const int64_t stride = kCacheSums + size;
  float peak = -std::numeric_limits<float>::infinity(), total = 0.0f;
  for (int64_t i = 0; i < n; ++i) peak = std::max(peak, parts[i * stride]);
  // Infinite peaks (logits beyond fp32) end as NaN, by inf - inf.
  const auto weight = [&](int64_t i) {
    float lanes[kLanes];
    store(lanes, exp2(broadcast(parts[i * stride] - peak)), Full{});
    return lanes[0];
  };
  for (int64_t i = 0; i < n; ++i) total += weight(i) * parts[i * stride + 1];
  const float factor = n > 0 ? 1.0f / total : 0.0f;
  for (int64_t d = 0; d < size; d += kLanes) {
    F32 sum = broadcast(0.0f);
    for (int64_t i = 0; i < n; ++i) {
      sum = multiply_add(broadcast(weight(i)), load(parts + i * stride + kCacheSums + d, Full{}),
                         sum);
    }
    store(out + d, sum * broadcast(factor), Full{});
  }
}

}  // namespace
}  // namespace qk::QK_ISA
