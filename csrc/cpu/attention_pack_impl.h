// Of attention.h: what is done once for all keys and values of a head.
#pragma once

#include <algorithm>
#include <limits>

#include "cpu/attention.h"
#include "cpu/attention_words.h"
#include "cpu/transpose.inl"

namespace qk::QK_ISA {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

QK_INLINE float largest_of(F32 x) {
  float lanes[kLanes];
  store(lanes, x, Full{});
  float result = lanes[0];
  for (int i = 1; i < kLanes; ++i) result = lanes[i] > result ? lanes[i] : result;
  return result;
}

// The scale of codes within +-127 for magnitudes up to `amax`.
QK_INLINE float code_scale(float amax) { return std::max(amax / 127.0f, 0x1p-100f); }
QK_INLINE I32 code_of(F32 x, F32 inverse) {
  const F32 limit = broadcast(127.0f);
  return round(max(broadcast(0.0f) - limit, min(limit, x * inverse)));
}

template <class T>
QK_INLINE bool is_finite(const T* x, int64_t n) {
  I32 most = broadcast(0);
  for (int64_t i = 0; i < n; i += kLanes) {
    most = max(most, bits(load(x + i, Full{})) & broadcast(0x7fffffff));
  }
  return largest_of(from_bits(min(most, broadcast(0x7f800000)))) < kInfinity;
}

template <class T>
int64_t key_statistics(const AttentionKeys& keys, int64_t first, int64_t last, float* sums,
                       float* amax) {
  const int64_t size = keys.size;
  std::fill(sums, sums + size, 0.0f);
  std::fill(amax, amax + size, 0.0f);
  int64_t bad = 0;
  for (int64_t j = first; j < last; ++j) {
    const T* const k = static_cast<const T*>(keys.k) + j * keys.k_stride;
    const T* const v = static_cast<const T*>(keys.v) + j * keys.v_stride;
    keys.bad[j] = !(is_finite(k, size) && is_finite(v, size));
    if (keys.bad[j]) {
      ++bad;
      continue;
    }
    for (int64_t i = 0; i < size; i += kLanes) {
      store(sums + i, load(sums + i, Full{}) + load(k + i, Full{}), Full{});
      store(amax + i, max(load(amax + i, Full{}), magnitude(load(v + i, Full{}))), Full{});
    }
  }
  return bad;
}

// Rows of words [16][words], kMaxHeadSize apart, to [words][16].
inline void turn_words(const float* rows, int64_t words, float* out) {
  int64_t w = 0;
  for (; w + kLanes <= words; w += kLanes) {
    transpose(rows + w, kMaxHeadSize, out + w * kLanes, kLanes);
  }
  for (; w < words; ++w) {
    for (int i = 0; i < kLanes; ++i) out[w * kLanes + i] = rows[i * kMaxHeadSize + w];
  }
}

template <class T>
void pack_keys(const AttentionKeys& keys, int64_t first, const float* mean, bool per_token,
               const AttentionPacked& packed, float* rows) {
  const int64_t size = keys.size, words = size / Keys8::kDepth;
  const auto counts = [&](int64_t j) {
    return j >= keys.begin && j < keys.end && !(packed.bad && packed.bad[j]);
  };
  const auto row = [&](int64_t j) { return static_cast<const T*>(keys.k) + j * keys.k_stride; };
  float scales[kScaleBlock];
  float largest = 0.0f;
  for (int64_t j = 0; j < kScaleBlock; ++j) {
    F32 most = broadcast(0.0f);
    if (counts(first + j)) {
      const T* const k = row(first + j);
      for (int64_t i = 0; i < size; i += kLanes) {
        most = max(most, magnitude(load(k + i, Full{}) - load(mean + i, Full{})));
      }
    }
    const float amax = largest_of(most);
    largest = std::max(largest, amax);
    scales[j] = code_scale(amax);
  }
  if (!per_token) std::fill(scales, scales + kScaleBlock, code_scale(largest));
  for (int64_t j = 0; j < kScaleBlock; ++j) {
    float* const codes = rows + j % kLanes * kMaxHeadSize;
    const bool counted = counts(first + j);
    const T* const k = counted ? row(first + j) : nullptr;
    const F32 inverse = broadcast(1.0f / scales[j]);
    for (int64_t i = 0; i < size; i += kLanes) {
      const I32 code =
          counted ? code_of(load(k + i, Full{}) - load(mean + i, Full{}), inverse) : broadcast(0);
      Keys8::store_keys(codes, i, code);
    }
    packed.key_scale[first + j] = scales[j];
    if ((j + 1) % kLanes == 0) {
      float* const out = static_cast<float*>(packed.keys) + (first + j + 1 - kLanes) * words;
      turn_words(rows, words, out);
    }
  }
}

template <class T>
void pack_keys_16(const AttentionKeys& keys, int64_t first, const AttentionPacked& packed,
                  float* rows) {
  const int64_t size = keys.size, words = size / Keys16::kDepth;
  for (int64_t j = first; j < first + kScaleBlock; ++j) {
    const bool counted = j >= keys.begin && j < keys.end && !(packed.bad && packed.bad[j]);
    const T* const k = counted ? static_cast<const T*>(keys.k) + j * keys.k_stride : nullptr;
    for (int64_t i = 0; i < size; i += kLanes) {
      Keys16::store(rows + j % kLanes * kMaxHeadSize, i,
                    counted ? load(k + i, Full{}) : broadcast(0.0f));
    }
    if ((j + 1) % kLanes == 0) {
      turn_words(rows, words, static_cast<float*>(packed.keys) + (j + 1 - kLanes) * words);
    }
  }
}

template <class Values, class T>
void pack_values(const AttentionKeys& keys, int64_t first, const AttentionPacked& packed) {
  const int64_t size = keys.size;
  float inverse[kMaxHeadSize];
  for (int64_t i = 0; packed.value_scale && i < size; i += kLanes) {
    store(inverse + i, broadcast(1.0f) / load(packed.value_scale + i, Full{}), Full{});
  }
  float* out = static_cast<float*>(packed.values) + first / Values::kDepth * size;
  for (int64_t j = first; j < first + kKeyBlock; j += Values::kDepth, out += size) {
    const T* rows[Values::kDepth];
    for (int t = 0; t < Values::kDepth; ++t) {
      const bool counted =
          j + t >= keys.begin && j + t < keys.end && !(packed.bad && packed.bad[j + t]);
      rows[t] = counted ? static_cast<const T*>(keys.v) + (j + t) * keys.v_stride : nullptr;
    }
    for (int64_t i = 0; i < size; i += kLanes) {
      F32 x[Values::kDepth];
#pragma GCC unroll 4
      for (int t = 0; t < Values::kDepth; ++t) {
        x[t] = rows[t] ? load(rows[t] + i, Full{}) : broadcast(0.0f);
        if (packed.value_scale) {
          const F32 limit = broadcast(127.0f);
          x[t] = max(broadcast(0.0f) - limit, min(limit, x[t] * load(inverse + i, Full{})));
        }
      }
      store_words(out + i, Values::word(x));
    }
  }
}

}  // namespace
}  // namespace qk::QK_ISA
