// Attention of few queries on a cache of codes, in fp32: the keys of a head are cut into parts, a
// block takes one part for up to eight rows of queries that share it, tile by tile through shared
// memory, and a second kernel joins the parts in order.
#include "cuda/common/attention_rows.h"
#include "cuda/common/kv_cache.h"
#include "cuda/common/quantizer.h"

namespace qk::cuda {
namespace {

constexpr int kBlock = 128;  // threads
constexpr int kRows = 8, kKeys = 64;
constexpr float kInfinity = __builtin_huge_valf();
constexpr uint32_t kHidden = 0x80000000u;  // the weight -0: its value is not looked at

template <int kWidth>
struct Scratch {
  float query[kRows][kWidth];
  uint32_t codes[2][kKeys][kWidth / 4 + 1];  // of keys and values; sums at the end
  float key_scale[kKeys], value_scale[kKeys];
  float weight[kRows][kKeys];
  float peak[kRows], total[kRows], decay[kRows];

  // What each thread has summed, [kBlock][kRows * 4], once the codes are done with.
  __device__ float& sum(int thread, int i) {
    static_assert(sizeof(codes) >= kBlock * kRows * 4 * sizeof(float));
    return reinterpret_cast<float*>(codes)[thread * kRows * 4 + i];
  }
};

// Rows of queries [first, first + rows) of a head of keys: row r is head h * group + r / tokens,
// token r % tokens.
struct Work {
  int b, h, part, first, rows;
};

__device__ inline Work work_of(const AttentionShape& shape, int index, int parts) {
  const int all = shape.heads / shape.kv_heads * shape.tokens, passes = (all + kRows - 1) / kRows;
  Work work;
  work.part = index % parts;
  work.first = index / parts % passes * kRows;
  work.rows = min(kRows, all - work.first);
  const int head = index / parts / passes;
  work.b = head / shape.kv_heads;
  work.h = head % shape.kv_heads;
  return work;
}

// Keys [begin, end) that token t of batch row b sees.
struct Span {
  int64_t begin, end;
};
__device__ inline Span span_of(const AttentionShape& shape, const AttentionHow& how, int b, int t) {
  const int64_t length = how.lengths ? how.lengths[b] : shape.keys;
  const int64_t place = length - shape.tokens + t;
  Span span{how.starts ? how.starts[b] : 0, how.causal ? place + 1 : length};
  if (how.window && place - how.window + 1 > span.begin) span.begin = place - how.window + 1;
  if (span.end > length) span.end = length;
  if (span.end > shape.keys) span.end = shape.keys;
  if (span.begin < 0) span.begin = 0;
  return span;
}

__device__ inline void load_codes_of(const Cache& cache, int b, int h, int j, int size,
                                     uint32_t* target, int col) {
  const uint8_t* const source =
      cache.codes + b * cache.strides[0] + h * cache.strides[1] + j * cache.strides[2];
  const Words2 codes = load_codes(Matrix{source, cache.dtype, 1, size, 0, 1}, 0, col, kChunk);
  target[col / 4] = codes.w[0];
  target[col / 4 + 1] = codes.w[1];
}

__device__ inline float four_products(DType dtype, uint32_t codes, const float* x, float sum) {
#pragma unroll
  for (int i = 0; i < 4; ++i) sum = fma_rn(code_value(dtype, codes >> (8 * i)), x[i], sum);
  return sum;
}

template <int kWidth>
__global__ void __launch_bounds__(kBlock)
    part_kernel(AttentionShape shape, HeadRows q, AttentionHow how, Cache keys, Cache values,
                int parts, int part_keys, int items, float* partial) {
  Scratch<kWidth>& s = shared<Scratch<kWidth>>();
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int size = shape.size, words = size / 4, group = shape.heads / shape.kv_heads;
  // Of the values' product: threads share the words of a row, and groups of threads the keys.
  const int groups = kBlock / words > 0 ? kBlock / words : 1, word = thread % words;
  const bool works = thread < groups * words;
  for (int index = static_cast<int>(blockIdx.x); index < items;
       index += static_cast<int>(gridDim.x)) {
    const Work work = work_of(shape, index, parts);
    for (int r = warp; r < kRows; r += kBlock / kWarp) {
      const int row = work.first + r, t = r < work.rows ? row % shape.tokens : -1;
      const RowPart part = read_row(q, work.b, work.h * group + row / shape.tokens, t, size);
#pragma unroll
      for (int c = 0; c < kRowChunks; ++c) {
        const int col = (lane + c * kWarp) * kChunk;
        if (col >= size) continue;
#pragma unroll
        for (int i = 0; i < kChunk; ++i) s.query[r][col + i] = part.v[c][i];
      }
    }
    if (thread < kRows) {
      s.peak[thread] = -kInfinity;
      s.total[thread] = 0.0f;
    }
    Span all{shape.keys, 0};
    for (int r = 0; r < work.rows; ++r) {
      const Span span = span_of(shape, how, work.b, (work.first + r) % shape.tokens);
      if (span.begin >= span.end) continue;
      all.begin = span.begin < all.begin ? span.begin : all.begin;
      all.end = span.end > all.end ? span.end : all.end;
    }
    const int from = work.part * part_keys;
    const int begin = static_cast<int>(all.begin > from ? all.begin : from);
    const int end = static_cast<int>(all.end < from + part_keys ? all.end : from + part_keys);
    float sums[kRows][4];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[r][i] = 0.0f;
    }
    for (int base = begin; base < end; base += kKeys) {
      const int count = min(kKeys, end - base);
      for (int i = thread; i < count * (size / kChunk); i += kBlock) {
        const int j = i / (size / kChunk), col = i % (size / kChunk) * kChunk;
        load_codes_of(keys, work.b, work.h, base + j, size, s.codes[0][j], col);
        load_codes_of(values, work.b, work.h, base + j, size, s.codes[1][j], col);
      }
      for (int j = thread; j < count; j += kBlock) {
        s.key_scale[j] =
            keys.scale[work.b * keys.scale_strides[0] + work.h * keys.scale_strides[1] +
                       (base + j) * keys.scale_strides[2]];
        s.value_scale[j] =
            values.scale[work.b * values.scale_strides[0] + work.h * values.scale_strides[1] +
                         (base + j) * values.scale_strides[2]];
      }
      sync_block();
      // A thread takes a key for half of the rows.
      const int key = thread % kKeys;
      float score[kRows / 2];
#pragma unroll
      for (int r = 0; r < kRows / 2; ++r) score[r] = 0.0f;
      if (key < count) {
        for (int w = 0; w < words; ++w) {
          const uint32_t codes = s.codes[0][key][w];
#pragma unroll
          for (int r = 0; r < kRows / 2; ++r)
            score[r] = four_products(keys.dtype, codes,
                                     s.query[thread / kKeys * (kRows / 2) + r] + 4 * w, score[r]);
        }
      }
#pragma unroll
      for (int r = 0; r < kRows / 2; ++r) {
        const int row = thread / kKeys * (kRows / 2) + r;
        const Span span = span_of(shape, how, work.b, (work.first + row) % shape.tokens);
        const bool seen =
            row < work.rows && key < count && base + key >= span.begin && base + key < span.end;
        s.weight[row][key] =
            seen ? mul_rn(mul_rn(score[r], s.key_scale[key]), how.scale) : -kInfinity;
      }
      sync_block();
      // A warp takes two rows.
      for (int row = warp; row < kRows; row += kBlock / kWarp) {
        const float one = s.weight[row][lane], other = s.weight[row][lane + kWarp];
        float most = fmaxf(one, other);
        for (int mask = kWarp / 2; mask > 0; mask /= 2) most = fmaxf(most, shuffle_xor(most, mask));
        const float old = s.peak[row], peak = fmaxf(old, most);
        const float shift = peak == -kInfinity ? 0.0f : peak;
        const float decay = power_of_two(old - shift);
        const float a = power_of_two(one - shift), b = power_of_two(other - shift);
        float sum = a + b;
        for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
        sync_warp();
        s.weight[row][lane] = one == -kInfinity ? float_of(kHidden) : a;
        s.weight[row][lane + kWarp] = other == -kInfinity ? float_of(kHidden) : b;
        if (lane == 0) {
          s.peak[row] = peak;
          s.decay[row] = decay;
          s.total[row] = add_rn(mul_rn(s.total[row], decay), sum);
        }
      }
      sync_block();
      if (works) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[r][i] *= s.decay[r];
        }
        for (int j = thread / words; j < count; j += groups) {
          const uint32_t codes = s.codes[1][j][word];
          float value[4];
#pragma unroll
          for (int i = 0; i < 4; ++i)
            value[i] = mul_rn(code_value(values.dtype, codes >> (8 * i)), s.value_scale[j]);
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const float weight = s.weight[r][j];
            if (bits_of(weight) == kHidden) continue;
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[r][i] = fma_rn(weight, value[i], sums[r][i]);
          }
        }
      }
      sync_block();
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s.sum(thread, r * 4 + i) = sums[r][i];
    }
    sync_block();
    const int64_t all_rows = int64_t{group} * shape.tokens;
    const int64_t head = int64_t{work.b} * shape.kv_heads + work.h;
    for (int i = thread; i < work.rows * size; i += kBlock) {
      const int r = i / size, d = i % size;
      float sum = 0.0f;
      for (int g = 0; g < groups; ++g) sum = add_rn(sum, s.sum(g * words + d / 4, r * 4 + d % 4));
      float* const out =
          partial + ((head * all_rows + work.first + r) * parts + work.part) * (size + 2);
      out[d] = sum;
      if (d == 0) {
        out[size] = s.peak[r];
        out[size + 1] = s.total[r];
      }
    }
    sync_block();
  }
}

// A warp joins the parts of a row of queries.
template <typename Element>
__global__ void __launch_bounds__(kThreads)
    join_kernel(AttentionShape shape, AttentionHow how, const float* partial, int parts,
                void* out) {
  const int lane = threadIdx.x % kWarp, size = shape.size;
  const int group = shape.heads / shape.kv_heads, all = group * shape.tokens;
  const int64_t rows = int64_t{shape.batch} * shape.kv_heads * all;
  for (int64_t row = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp; row < rows;
       row += int64_t{gridDim.x} * (kThreads / kWarp)) {
    const float* const from = partial + row * parts * (size + 2);
    const int head = static_cast<int>(row / all), r = static_cast<int>(row % all);
    const int b = head / shape.kv_heads, t = r % shape.tokens;
    const int h = head % shape.kv_heads * group + r / shape.tokens;
    const Span span = span_of(shape, how, b, t);
    float peak = -kInfinity, total = 0.0f;
    for (int p = 0; p < parts; ++p) peak = fmaxf(peak, from[p * (size + 2) + size]);
    const float shift = peak == -kInfinity ? 0.0f : peak;
    for (int p = 0; p < parts; ++p) {
      const float* const part = from + p * (size + 2);
      total = fma_rn(part[size + 1], power_of_two(part[size] - shift), total);
    }
    const float factor = span.begin < span.end ? div_rn(1.0f, total) : 0.0f;
    auto* const target = static_cast<typename Element::Storage*>(out) +
                         ((int64_t{b} * shape.tokens + t) * shape.heads + h) * size;
    for (int col = lane * kChunk; col < size; col += kWarp * kChunk) {
      float values[kChunk];
#pragma unroll
      for (int i = 0; i < kChunk; ++i) values[i] = 0.0f;
      for (int p = 0; p < parts; ++p) {
        const float* const part = from + p * (size + 2);
        const float decay = power_of_two(part[size] - shift);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) values[i] = fma_rn(part[col + i], decay, values[i]);
      }
#pragma unroll
      for (int i = 0; i < kChunk; ++i) values[i] = mul_rn(values[i], factor);
      store_chunk<Element>(target + col, values, kChunk);
    }
  }
}

// Keys of a part: so few that a long cache fills the device, and at most 64 parts.
int keys_of_part(int capacity) {
  const int64_t least = ceil_div(capacity, 64), whole = least < 256 ? 256 : least;
  return static_cast<int>(ceil_div(whole, kKeys) * kKeys);
}

template <int kWidth>
cudaError_t launch_parts(const AttentionShape& shape, const HeadRows& q, const AttentionHow& how,
                         const Cache& keys, const Cache& values, float* partial,
                         cudaStream_t stream) {
  const int parts = kv_parts(shape.keys);
  const int64_t passes =
      ceil_div(int64_t{shape.heads} / shape.kv_heads * shape.tokens, int64_t{kRows});
  const int64_t items = int64_t{shape.batch} * shape.kv_heads * passes * parts;
  return launch(part_kernel<kWidth>, dim3(grid_extent(items)), dim3(kBlock),
                sizeof(Scratch<kWidth>), stream, shape, q, how, keys, values, parts,
                keys_of_part(shape.keys), static_cast<int>(items), partial);
}

}  // namespace

int kv_parts(int capacity) { return static_cast<int>(ceil_div(capacity, keys_of_part(capacity))); }

cudaError_t kv_attention(const AttentionShape& shape, const HeadRows& q, const AttentionHow& how,
                         const Cache& keys, const Cache& values, float* partial, void* out,
                         cudaStream_t stream) {
  const int64_t rows = int64_t{shape.batch} * shape.heads * shape.tokens;
  if (rows == 0 || shape.keys == 0) return cudaSuccess;
  cudaError_t status = cudaSuccess;
  if (shape.size <= 128) {
    status = launch_parts<128>(shape, q, how, keys, values, partial, stream);
  } else if (shape.size <= 256) {
    status = launch_parts<256>(shape, q, how, keys, values, partial, stream);
  } else {
    status = launch_parts<512>(shape, q, how, keys, values, partial, stream);
  }
  if (status != cudaSuccess) return status;
  return with_element(q.dtype, [&](auto element) {
    return launch(join_kernel<decltype(element)>,
                  dim3(grid_extent(ceil_div(rows, kThreads / kWarp))), dim3(kThreads), 0, stream,
                  shape, how, partial, kv_parts(shape.keys), out);
  });
}

}  // namespace qk::cuda
