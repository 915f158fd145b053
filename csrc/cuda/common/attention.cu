// A warp takes 16 queries, a block 64 (32 where heads are wide), and goes over the keys that any of
// them sees in tiles, two in flight. Scores are int8 or bf16 products; weights go from the sums'
// registers straight into the product with the values. Outputs wider than 128 channels are made in
// slices, each with scores of its own.
#include <type_traits>

#include "cuda/common/attention_rows.h"
#include "cuda/common/mma.h"

namespace qk::cuda {
namespace {

constexpr float kInfinity = __builtin_huge_valf();
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

// Keys [begin, end) that query t sees.
struct Seen {
  int begin, end;
};
__device__ inline Seen seen_keys(const AttentionShape& shape, const AttentionHow& how,
                                 const Valid& valid, int t) {
  const int64_t position = int64_t{t} + shape.keys - shape.tokens + 1;
  const int64_t begin = how.window ? position - how.window : 0;
  const int64_t end = how.causal ? position : valid.end;
  const int first = static_cast<int>(begin < valid.begin ? valid.begin : begin);
  const int last = static_cast<int>(end < valid.end ? end : valid.end);
  return {first, last};
}

// A lane's part of 16 queries: rows lane / 4 and 8 more.
struct Rows {
  Seen seen[2];
  float factor[2], peak[2], total[2];
};

// Scores of the tile as weights of an online softmax; `decay` is what older sums are worth.
template <typename C>
__device__ void weigh(float (&score)[C::kKeys / 8][4], Rows& rows, int base, const float* key_scale,
                      float (&decay)[2]) {
  const int pair = static_cast<int>(threadIdx.x) % 4 * 2;
  float most[2] = {-kInfinity, -kInfinity};
#pragma unroll
  for (int n = 0; n < C::kKeys / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = n * 8 + pair + i % 2;
      float logit = mul_rn(score[n][i], rows.factor[i / 2]);
      if constexpr (C::kKeysInInt8) logit = mul_rn(logit, key_scale[key]);
      const Seen& seen = rows.seen[i / 2];
      score[n][i] = base + key >= seen.begin && base + key < seen.end ? logit : -kInfinity;
      most[i / 2] = fmaxf(most[i / 2], score[n][i]);
    }
  }
  float base_of[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    most[r] = fmaxf(most[r], shuffle_xor(most[r], 1));
    most[r] = fmaxf(most[r], shuffle_xor(most[r], 2));
    const float peak = fmaxf(rows.peak[r], most[r]);
    base_of[r] = peak == -kInfinity ? 0.0f : peak;
    decay[r] = power_of_two(rows.peak[r] - base_of[r]);
    rows.peak[r] = peak;
    rows.total[r] *= decay[r];
  }
#pragma unroll
  for (int n = 0; n < C::kKeys / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float weight = power_of_two(score[n][i] - base_of[i / 2]);
      if constexpr (C::kValuesInInt8) {
        weight = static_cast<float>(round_to_int(mul_rn(weight, 127.0f)));
      } else {
        weight = float_of(bfloat16_from(weight) << 16);
      }
      score[n][i] = weight;
      rows.total[i / 2] += weight;
    }
  }
}

template <typename C>
__device__ void add_values(const float (&weight)[C::kKeys / 8][4], const uint8_t* values,
                           int channels, const float (&decay)[2], Sums (&sums)[kSlice / 8]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int n = 0; n < kSlice / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[n].v[i] *= decay[i / 2];
  }
  if constexpr (C::kValuesInInt8) {
    Left left[C::kKeys / 32];
#pragma unroll
    for (int g = 0; g < C::kKeys / 32; ++g) {
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        uint32_t code[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          code[i] = static_cast<uint32_t>(
              static_cast<int>(weight[g * 4 + part / 2 * 2 + i / 2][part % 2 * 2 + i % 2]));
        }
        left[g].w[part] = gather_bytes(code[0], code[1], code[2], code[3]);
      }
    }
#pragma unroll
    for (int n = 0; n < kSlice / 8; ++n) {
      if (n * 8 >= channels) break;
      IntSums product;
#pragma unroll
      for (int g = 0; g < C::kKeys / 32; ++g) {
        const uint8_t* const row =
            values + (g * kSlice + n * 8 + lane / 4) * kCodeRow + lane % 4 * 4;
        multiply_add(product, left[g],
                     Right{{load_vector<uint32_t>(row), load_vector<uint32_t>(row + 16)}});
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[n].v[i] += static_cast<float>(product.v[i]);
    }
  } else {
#pragma unroll
    for (int g = 0; g < C::kKeys / 16; ++g) {
      const float (&low)[4] = weight[2 * g], (&high)[4] = weight[2 * g + 1];
      const Left left{{narrow_bfloat16x2(low[0], low[1]), narrow_bfloat16x2(low[2], low[3]),
                       narrow_bfloat16x2(high[0], high[1]), narrow_bfloat16x2(high[2], high[3])}};
      const int part = lane / 8;
      const uint8_t* const row = values + (g * 16 + part % 2 * 8 + lane % 8) * kValueRow;
#pragma unroll
      for (int n = 0; n < kSlice / 16; ++n) {
        if (n * 16 >= channels) break;
        const Words4 m =
            load_transposed(reinterpret_cast<const uint16_t*>(row + (n * 16 + part / 2 * 8) * 2));
        multiply_add<BFloat16>(sums[2 * n], left, Right{{m.w[0], m.w[1]}});
        multiply_add<BFloat16>(sums[2 * n + 1], left, Right{{m.w[2], m.w[3]}});
      }
    }
  }
}

template <typename C>
__device__ void scores_of(const uint8_t (&queries)[C::kQueries][C::kRow],
                          const uint8_t (&keys)[C::kKeys][C::kRow], int bytes,
                          float (&score)[C::kKeys / 8][4]) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = threadIdx.x % kWarp;
  const int part = lane / 8;
  const uint8_t* const left_row = queries[warp * 16 + part % 2 * 8 + lane % 8] + part / 2 * 16;
  using Total = typename std::conditional_t<C::kKeysInInt8, IntSums, Sums>;
  Total total[C::kKeys / 8];
  for (int k = 0; k < bytes; k += 32) {
    const Words4 l = load_matrices(reinterpret_cast<const uint16_t*>(left_row + k));
    const Left left{{l.w[0], l.w[1], l.w[2], l.w[3]}};
#pragma unroll
    for (int n = 0; n < C::kKeys / 16; ++n) {
      const Words4 m = load_matrices(reinterpret_cast<const uint16_t*>(
          keys[n * 16 + part / 2 * 8 + lane % 8] + part % 2 * 16 + k));
      const Right one{{m.w[0], m.w[1]}}, other{{m.w[2], m.w[3]}};
      if constexpr (C::kKeysInInt8) {
        multiply_add(total[2 * n], left, one);
        multiply_add(total[2 * n + 1], left, other);
      } else {
        multiply_add<BFloat16>(total[2 * n], left, one);
        multiply_add<BFloat16>(total[2 * n + 1], left, other);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < C::kKeys / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) score[n][i] = static_cast<float>(total[n].v[i]);
  }
}

__device__ inline void store_pair(void* out, DType dtype, int64_t at, float first, float second) {
  if (dtype == DType::kFloat32) {
    store_vector(static_cast<float*>(out) + at, Words2{{bits_of(first), bits_of(second)}});
  } else {
    store_vector(static_cast<uint16_t*>(out) + at, dtype == DType::kFloat16
                                                       ? narrow_float16x2(first, second)
                                                       : narrow_bfloat16x2(first, second));
  }
}

template <typename C>
__device__ void store_rows(const AttentionShape& shape, const HeadRows& q, const Place& place,
                           const AttentionPacked& packed, const typename C::Shared& shared,
                           const Rows& rows, const Sums (&sums)[kSlice / 8], void* out) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = threadIdx.x % kWarp;
  const int* const before = packed.bad_before + int64_t{place.source} * (shape.padded() + 1);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float total = rows.total[r];
    total += shuffle_xor(total, 1);
    total += shuffle_xor(total, 2);
    const int row = warp * 16 + lane / 4 + r * 8;
    if (row >= place.rows) continue;
    const Seen& seen = rows.seen[r];
    float factor = 0.0f;
    if (seen.begin < seen.end) {
      const bool poisoned = shared.bad[row] || before[seen.end] != before[seen.begin] ||
                            !(rows.peak[r] < kInfinity && rows.factor[r] < kInfinity);
      factor = poisoned ? float_of(0x7FC00000u) : div_rn(1.0f, total);
    }
    const int64_t at =
        ((int64_t{place.b} * shape.tokens + place.first + row) * shape.heads + place.h) *
        shape.size;
#pragma unroll
    for (int n = 0; n < kSlice / 8; ++n) {
      if (n * 8 >= place.channels) break;
      const int channel = place.channel + n * 8 + lane % 4 * 2;
      float value[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        value[i] = mul_rn(sums[n].v[r * 2 + i], factor);
        if constexpr (C::kValuesInInt8) {
          value[i] = mul_rn(value[i],
                            packed.value_scale[int64_t{place.source} * shape.size + channel + i]);
        }
      }
      store_pair(out, q.dtype, at + channel, value[0], value[1]);
    }
  }
}

template <typename C>
__global__ void __launch_bounds__(C::kWarps* kWarp)
    attend_kernel(AttentionShape shape, HeadRows q, AttentionHow how, AttentionPacked packed,
                  void* out) {
  typename C::Shared& scratch = shared<typename C::Shared>();
  const int blocks = (shape.tokens + C::kQueries - 1) / C::kQueries;
  const int slices = (shape.size + kSlice - 1) / kSlice;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = threadIdx.x % kWarp;
  const int bytes = shape.size * (C::kKeysInInt8 ? 1 : 2);
  for (int index = static_cast<int>(blockIdx.x);
       index < shape.batch * shape.heads * blocks * slices; index += static_cast<int>(gridDim.x)) {
    Place place;
    place.channel = index % slices * kSlice;
    place.channels = min(kSlice, shape.size - place.channel);
    const int head = index / slices / blocks;
    // Later queries see more keys: they go first.
    place.first = (blocks - 1 - index / slices % blocks) * C::kQueries;
    place.rows = min(C::kQueries, shape.tokens - place.first);
    place.b = head / shape.heads;
    place.h = head % shape.heads;
    place.source = place.b * shape.kv_heads + place.h / (shape.heads / shape.kv_heads);
    take_queries<C>(shape, q, how, place, scratch);
    sync_block();

    const Valid valid(how, place.b, shape.keys);
    Rows rows;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = warp * 16 + lane / 4 + r * 8;
      rows.seen[r] = seen_keys(shape, how, valid, place.first + min(row, place.rows - 1));
      rows.factor[r] = scratch.factor[row];
      rows.peak[r] = -kInfinity;
      rows.total[r] = 0.0f;
    }
    Sums sums[kSlice / 8];
    const int begin = seen_keys(shape, how, valid, place.first).begin / C::kKeys * C::kKeys;
    const int end = seen_keys(shape, how, valid, place.first + place.rows - 1).end;
    int stage = 0;
    if (C::kStages > 1 && begin < end) {
      load_tile<C>(shape, packed, place, begin, 0, scratch);
      copy_commit();
    }
    for (int base = begin; base < end; base += C::kKeys) {
      if constexpr (C::kStages > 1) {
        if (base + C::kKeys < end)
          load_tile<C>(shape, packed, place, base + C::kKeys, 1 - stage, scratch);
        copy_commit();
        copy_wait<1>();
      } else {
        load_tile<C>(shape, packed, place, base, 0, scratch);
        copy_commit();
        copy_wait<0>();
      }
      sync_block();
      float score[C::kKeys / 8][4], decay[2];
      scores_of<C>(scratch.queries, scratch.keys[stage], bytes, score);
      weigh<C>(score, rows, base, scratch.key_scale[stage], decay);
      add_values<C>(score, scratch.values[stage], place.channels, decay, sums);
      sync_block();
      if (C::kStages > 1) stage = 1 - stage;
    }
    copy_wait<0>();
    store_rows<C>(shape, q, place, packed, scratch, rows, sums, out);
    sync_block();  // the queries may be written again
  }
}

template <typename C>
cudaError_t attend_with(const AttentionShape& shape, const HeadRows& q, const AttentionHow& how,
                        const AttentionPacked& packed, void* out, cudaStream_t stream) {
  const int64_t items = int64_t{shape.batch} * shape.heads * ceil_div(shape.tokens, C::kQueries) *
                        ceil_div(shape.size, kSlice);
  if (items == 0) return cudaSuccess;
  return launch(attend_kernel<C>, dim3(grid_extent(items)), dim3(C::kWarps * kWarp),
                sizeof(typename C::Shared), stream, shape, q, how, packed, out);
}

template <bool kCodes, bool kInt8Values>
cudaError_t attend_wide(const AttentionShape& shape, const HeadRows& q, const AttentionHow& how,
                        const AttentionPacked& packed, void* out, cudaStream_t stream) {
  const int bytes = shape.size * (kCodes ? 1 : 2);
  if (bytes <= 128)
    return attend_with<Config<kCodes, kInt8Values, 128>>(shape, q, how, packed, out, stream);
  if (bytes <= 256)
    return attend_with<Config<kCodes, kInt8Values, 256>>(shape, q, how, packed, out, stream);
  if (bytes <= 512)
    return attend_with<Config<kCodes, kInt8Values, 512>>(shape, q, how, packed, out, stream);
  if constexpr (!kCodes) {
    return attend_with<Config<kCodes, kInt8Values, 1024>>(shape, q, how, packed, out, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t attend(const AttentionShape& shape, const HeadRows& q, const AttentionHow& how,
                   const AttentionPacked& packed, void* out, cudaStream_t stream) {
  if (!how.codes) return attend_wide<false, false>(shape, q, how, packed, out, stream);
  if (how.int8_values) return attend_wide<true, true>(shape, q, how, packed, out, stream);
  return attend_wide<true, false>(shape, q, how, packed, out, stream);
}

}  // namespace qk::cuda
