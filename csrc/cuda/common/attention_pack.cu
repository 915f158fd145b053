// Keys and values, packed: which of them are not finite, the keys' mean and the values' largest
// magnitudes, and then their codes.
#include "cuda/common/attention_rows.h"

namespace qk::cuda {
namespace {

constexpr int kWarps = kThreads / kWarp;

// A warp takes a key: bad if it or its value has anything that is not finite, and is valid.
__global__ void __launch_bounds__(kThreads)
    mark_kernel(AttentionShape shape, HeadRows k, HeadRows v, AttentionHow how, uint8_t* bad) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, padded = shape.padded();
  const int count = shape.batch * shape.kv_heads;
  for (int head = static_cast<int>(blockIdx.y); head < count; head += static_cast<int>(gridDim.y)) {
    const int b = head / shape.kv_heads, h = head % shape.kv_heads;
    const Valid valid(how, b, shape.keys);
    for (int j = static_cast<int>(blockIdx.x) * kWarps + warp; j < padded;
         j += static_cast<int>(gridDim.x) * kWarps) {
      const int at = j >= valid.begin && j < valid.end ? j : -1;
      const bool finite = is_finite(warp_absmax(read_row(k, b, h, at, shape.size))) &&
                          is_finite(warp_absmax(read_row(v, b, h, at, shape.size)));
      if (threadIdx.x % kWarp == 0) bad[int64_t{head} * padded + j] = finite ? 0 : 1;
    }
  }
}

struct StatisticsScratch {
  float sums[kWarps][kMaxHeadSize], amax[kWarps][kMaxHeadSize];
};

// Sums of the keys' channels and largest magnitudes of the values' over a chunk of keys: each warp
// takes every eighth key, and the warps are added up in order.
__global__ void __launch_bounds__(kThreads)
    statistics_kernel(AttentionShape shape, HeadRows k, HeadRows v, AttentionHow how,
                      const uint8_t* bad, float* partial) {
  StatisticsScratch& scratch = shared<StatisticsScratch>();
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = threadIdx.x % kWarp;
  const int size = shape.size, parts = shape.batch * shape.kv_heads * shape.chunks();
  for (int index = static_cast<int>(blockIdx.x); index < parts;
       index += static_cast<int>(gridDim.x)) {
    const int head = index / shape.chunks(), first = index % shape.chunks() * kAttentionChunk;
    const int b = head / shape.kv_heads, h = head % shape.kv_heads;
    const Valid valid(how, b, shape.keys);
    const uint8_t* const marks = bad + int64_t{head} * shape.padded();
    RowPart sums = read_row(k, b, h, -1, size), amax = sums;
    const int last = min(first + kAttentionChunk, valid.end);
    for (int j = first + warp; j < last; j += kWarps) {
      if (j < valid.begin || marks[j]) continue;
      const RowPart key = read_row(k, b, h, j, size), value = read_row(v, b, h, j, size);
#pragma unroll
      for (int c = 0; c < kRowChunks; ++c) {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          sums.v[c][i] = add_rn(sums.v[c][i], key.v[c][i]);
          amax.v[c][i] = fmaxf(amax.v[c][i], float_of(bits_of(value.v[c][i]) & 0x7FFFFFFFu));
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kRowChunks; ++c) {
      const int col = (lane + c * kWarp) * kChunk;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        scratch.sums[warp][col + i] = sums.v[c][i];
        scratch.amax[warp][col + i] = amax.v[c][i];
      }
    }
    sync_block();
    float* const out = partial + int64_t{index} * 2 * size;
    for (int d = static_cast<int>(threadIdx.x); d < size; d += kThreads) {
      float sum = 0.0f, most = 0.0f;
      for (int w = 0; w < kWarps; ++w) {
        sum = add_rn(sum, scratch.sums[w][d]);
        most = fmaxf(most, scratch.amax[w][d]);
      }
      out[d] = sum;
      out[size + d] = most;
    }
    sync_block();
  }
}

struct JoinScratch {
  int bad[kThreads];
};

// The mean, the values' scales, and the bad keys before each key, of one head.
__global__ void __launch_bounds__(kThreads)
    join_kernel(AttentionShape shape, AttentionHow how, AttentionPacked packed) {
  JoinScratch& scratch = shared<JoinScratch>();
  const int thread = static_cast<int>(threadIdx.x), padded = shape.padded(), size = shape.size;
  for (int head = static_cast<int>(blockIdx.x); head < shape.batch * shape.kv_heads;
       head += static_cast<int>(gridDim.x)) {
    const Valid valid(how, head / shape.kv_heads, shape.keys);
    const uint8_t* const marks = packed.bad + int64_t{head} * padded;
    int* const before = packed.bad_before + int64_t{head} * (padded + 1);
    const int each = (padded + kThreads - 1) / kThreads;
    const int first = min(thread * each, padded), last = min(first + each, padded);
    int count = 0;
    for (int j = first; j < last; ++j) count += marks[j];
    scratch.bad[thread] = count;
    sync_block();
    int seen = 0, all = 0;
    for (int i = 0; i < kThreads; ++i) {
      seen += i < thread ? scratch.bad[i] : 0;
      all += scratch.bad[i];
    }
    for (int j = first; j < last; ++j) {
      before[j] = seen;
      seen += marks[j];
    }
    if (thread == 0) before[padded] = all;
    const int good = max(valid.end - valid.begin - all, 1);
    const float* const parts = packed.partial + int64_t{head} * shape.chunks() * 2 * size;
    for (int d = thread; d < size; d += kThreads) {
      float sum = 0.0f, most = 0.0f;
      for (int c = 0; c < shape.chunks(); ++c) {
        sum = add_rn(sum, parts[c * 2 * size + d]);
        most = fmaxf(most, parts[c * 2 * size + size + d]);
      }
      packed.mean[int64_t{head} * size + d] =
          how.smooth_k ? div_rn(sum, static_cast<float>(good)) : 0.0f;
      packed.value_scale[int64_t{head} * size + d] = code_scale(most);
    }
    sync_block();
  }
}

// Where among 32 key slots `attend` has key j of them: its weights come two neighbours at a time,
// of four groups of eight.
__device__ int slot_of(int key) {
  const int tile = key / 8 % 4, pair = key % 8 / 2;
  return tile / 2 * 16 + pair * 4 + tile % 2 * 2 + key % 2;
}

struct PackScratch {
  float amax[kAttentionPad];
};

// A block takes 64 keys, a warp eight of them.
__global__ void __launch_bounds__(kThreads)
    pack_kernel(AttentionShape shape, HeadRows k, HeadRows v, AttentionHow how,
                AttentionPacked packed) {
  PackScratch& scratch = shared<PackScratch>();
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = threadIdx.x % kWarp;
  const int padded = shape.padded(), size = shape.size, groups = padded / kAttentionPad;
  for (int index = static_cast<int>(blockIdx.x); index < shape.batch * shape.kv_heads * groups;
       index += static_cast<int>(gridDim.x)) {
    const int head = index / groups, first = index % groups * kAttentionPad;
    const int b = head / shape.kv_heads, h = head % shape.kv_heads;
    const Valid valid(how, b, shape.keys);
    const uint8_t* const marks = packed.bad + int64_t{head} * padded;
    const float* const mean = packed.mean + int64_t{head} * size;
    const auto counted = [&](int j) { return j >= valid.begin && j < valid.end && !marks[j]; };
    const auto smooth = [&](int j) {
      RowPart part = read_row(k, b, h, counted(j) ? j : -1, size);
      if (!how.codes || !counted(j)) return part;
#pragma unroll
      for (int c = 0; c < kRowChunks; ++c) {
        const int col = (lane + c * kWarp) * kChunk;
        if (col >= size) continue;
#pragma unroll
        for (int i = 0; i < kChunk; ++i) part.v[c][i] = sub_rn(part.v[c][i], mean[col + i]);
      }
      return part;
    };
    if (how.codes) {
      for (int r = warp; r < kAttentionPad; r += kWarps) {
        const float amax = warp_absmax(smooth(first + r));
        if (lane == 0) scratch.amax[r] = amax;
      }
      sync_block();
    }
    for (int r = warp; r < kAttentionPad; r += kWarps) {
      const int j = first + r;
      const int64_t row = int64_t{head} * padded + j;
      const RowPart key = smooth(j);
      if (how.codes) {
        float amax = scratch.amax[r];
        if (!how.per_token) {
          for (int i = 0; i < kAttentionPad; ++i) amax = fmaxf(amax, scratch.amax[i]);
        }
        const float scale = code_scale(amax);
        if (lane == 0) packed.key_scale[row] = scale;
        store_codes_of(key, scale, size, static_cast<uint8_t*>(packed.keys) + row * size);
      } else {
        store_bfloat16(key, size, static_cast<uint8_t*>(packed.keys) + row * 2 * size);
      }
      const RowPart value = read_row(v, b, h, counted(j) ? j : -1, size);
      if (!how.int8_values) {
        store_bfloat16(value, size, static_cast<uint8_t*>(packed.values) + row * 2 * size);
        continue;
      }
      uint8_t* const target =
          static_cast<uint8_t*>(packed.values) + (int64_t{head} * padded + j / 32 * 32) * size;
#pragma unroll
      for (int c = 0; c < kRowChunks; ++c) {
        const int col = (lane + c * kWarp) * kChunk;
        if (col >= size) continue;
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          const float scale = packed.value_scale[int64_t{head} * size + col + i];
          target[(col + i) * 32 + slot_of(j % 32)] =
              static_cast<uint8_t>(code_of(value.v[c][i], div_rn(1.0f, scale)));
        }
      }
    }
    sync_block();  // scratch may be written again
  }
}

}  // namespace

cudaError_t pack_keys(const AttentionShape& shape, const HeadRows& k, const HeadRows& v,
                      const AttentionHow& how, const AttentionPacked& packed, cudaStream_t stream) {
  const int heads = shape.batch * shape.kv_heads;
  if (heads == 0 || shape.keys == 0) return cudaSuccess;
  cudaError_t status =
      launch(mark_kernel, dim3(grid_extent(ceil_div(shape.padded(), kWarps)), grid_extent(heads)),
             dim3(kThreads), 0, stream, shape, k, v, how, packed.bad);
  if (status != cudaSuccess) return status;
  status =
      launch(statistics_kernel, dim3(grid_extent(int64_t{heads} * shape.chunks())), dim3(kThreads),
             sizeof(StatisticsScratch), stream, shape, k, v, how, packed.bad, packed.partial);
  if (status != cudaSuccess) return status;
  status = launch(join_kernel, dim3(grid_extent(heads)), dim3(kThreads), sizeof(JoinScratch),
                  stream, shape, how, packed);
  if (status != cudaSuccess) return status;
  return launch(pack_kernel, dim3(grid_extent(int64_t{heads} * (shape.padded() / kAttentionPad))),
                dim3(kThreads), sizeof(PackScratch), stream, shape, k, v, how, packed);
}

}  // namespace qk::cuda
