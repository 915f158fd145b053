// What a block of attend_kernel (attention.cu) has in shared memory, and how it comes there: its
// queries, rounded once, and tiles of packed keys and values by asynchronous copies.
#pragma once

#include "cuda/common/attention_rows.h"

namespace qk::cuda {

constexpr int kSlice = 128;                                     // channels
constexpr int kValueRow = kSlice * 2 + 16, kCodeRow = 32 + 16;  // bytes, without bank conflicts

// kBytes: of a row of queries or keys at most.
template <bool kCodes, bool kInt8Values, int kBytes>
struct Config {
  static constexpr bool kKeysInInt8 = kCodes, kValuesInInt8 = kInt8Values;
  static constexpr int kWarps = kBytes <= 256 ? 4 : 2;
  static constexpr int kQueries = kWarps * 16;
  static constexpr int kKeys = kBytes <= 256 ? 64 : 32;
  static constexpr int kStages = kBytes <= 512 ? 2 : 1;
  static constexpr int kRow = kBytes + 16;
  static constexpr int kValueBytes =
      kInt8Values ? kKeys / 32 * kSlice * kCodeRow : kKeys * kValueRow;
  struct Shared {
    alignas(16) uint8_t queries[kQueries][kRow];
    alignas(16) uint8_t keys[kStages][kKeys][kRow];
    alignas(16) uint8_t values[kStages][kValueBytes];
    alignas(16) float key_scale[kStages][kKeys];
    float amax[kAttentionPad];
    float factor[kQueries];
    int bad[kQueries];
  };
};

// What the block works on.
struct Place {
  int b, h, source;  // batch row, head, head of keys (of all rows)
  int first, rows;   // queries
  int channel, channels;
};

template <typename C>
__device__ void take_queries(const AttentionShape& shape, const HeadRows& q,
                             const AttentionHow& how, const Place& place,
                             typename C::Shared& shared) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = threadIdx.x % kWarp;
  if constexpr (C::kKeysInInt8) {
    // Scales of blocks count whole blocks of 64 tokens, of which these queries may be half.
    const int base = place.first / kAttentionPad * kAttentionPad;
    for (int r = warp; r < kAttentionPad; r += C::kWarps) {
      const int t = base + r < shape.tokens ? base + r : -1;
      const float amax = warp_absmax(read_row(q, place.b, place.h, t, shape.size));
      if (lane == 0) shared.amax[r] = is_finite(amax) ? amax : 0.0f;
    }
    sync_block();
  }
  const int bytes = C::kKeysInInt8 ? 1 : 2;
  for (int r = warp; r < C::kQueries; r += C::kWarps) {
    const int t = r < place.rows ? place.first + r : -1;
    RowPart part = read_row(q, place.b, place.h, t, shape.size);
    const bool bad = !is_finite(warp_absmax(part));
    if (bad) part = read_row(q, place.b, place.h, -1, shape.size);
    float factor = how.scale;
    if constexpr (C::kKeysInInt8) {
      float amax = shared.amax[(place.first + r) % kAttentionPad];
      if (!how.per_token) {
        for (int i = 0; i < kAttentionPad; ++i) amax = fmaxf(amax, shared.amax[i]);
      }
      const float scale = code_scale(amax);
      factor = mul_rn(scale, how.scale);
      store_codes_of(part, scale, shape.size, shared.queries[r]);
    } else {
      store_bfloat16(part, shape.size, shared.queries[r]);
    }
    // To whole steps of 32 bytes.
    const int used = shape.size * bytes;
    if (used % 32 != 0 && lane < 4) store_vector(shared.queries[r] + used + lane * 4, 0u);
    if (lane == 0) {
      shared.factor[r] = factor;
      shared.bad[r] = bad;
    }
  }
}

template <typename C>
__device__ void load_tile(const AttentionShape& shape, const AttentionPacked& packed,
                          const Place& place, int base, int stage, typename C::Shared& shared) {
  const int thread = static_cast<int>(threadIdx.x), threads = C::kWarps * kWarp;
  const int size = shape.size, bytes = size * (C::kKeysInInt8 ? 1 : 2);
  const int64_t row = int64_t{place.source} * shape.padded() + base;
  const int steps = (bytes + 31) / 32 * 2;
  const auto* keys = static_cast<const uint8_t*>(packed.keys) + row * bytes;
  for (int i = thread; i < C::kKeys * steps; i += threads) {
    const int r = i / steps, at = i % steps * 16;
    const int there = at < bytes ? 16 : 0;
    copy_async(shared.keys[stage][r] + at, keys + int64_t{r} * bytes + (there ? at : 0), there);
  }
  if constexpr (C::kKeysInInt8) {
    for (int i = thread; i < C::kKeys / 4; i += threads)
      copy_async(shared.key_scale[stage] + i * 4, packed.key_scale + row + i * 4, 16);
  }
  if constexpr (C::kValuesInInt8) {
    const auto* values = static_cast<const uint8_t*>(packed.values) + row * size;
    const int each = place.channels * 2;
    for (int i = thread; i < C::kKeys / 32 * each; i += threads) {
      const int group = i / each, channel = i % each / 2, half = i % 2 * 16;
      copy_async(shared.values[stage] + (group * kSlice + channel) * kCodeRow + half,
                 values + (int64_t{group} * size + place.channel + channel) * 32 + half, 16);
    }
  } else {
    const auto* values = static_cast<const uint8_t*>(packed.values) + row * 2 * size;
    const int each = place.channels / 8;
    for (int i = thread; i < C::kKeys * each; i += threads) {
      const int r = i / each, at = i % each * 16;
      copy_async(shared.values[stage] + r * kValueRow + at,
                 values + int64_t{r} * 2 * size + 2 * place.channel + at, 16);
    }
  }
}

}  // namespace qk::cuda
