// A warp takes 16 queries, a block 64 (32 where heads are wide), and goes over the keys that any of
// them sees in tiles, two in flight. Scores are int8 or bf16 products; weights go from the sums'
// registers straight into the product with the values. Outputs wider than 128 channels are made in
// slices, each with scores of its own.
#include <type_traits>

#include "cuda/common/attention_tiles.h"
#include "cuda/common/mma.h"

namespace qk::cuda {
namespace {

constexpr float kInfinity = __builtin_huge_valf();

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
