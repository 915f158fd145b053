// A warp takes a token of a head: appended, or read back.
#include "cuda/common/kv_cache.h"

#include "cuda/common/attention_rows.h"
#include "cuda/common/quantizer.h"

namespace qk::cuda {
namespace {

constexpr int kWarps = kThreads / kWarp;

struct Positions {
  const int64_t* data;
  int64_t strides[2];
};

// Calls f(b, h, t) by the whole warp for every token of every head.
template <typename Body>
__device__ void for_each_token(int batch, int heads, int tokens, Body body) {
  const int64_t count = int64_t{batch} * heads * tokens, step = int64_t{gridDim.x} * kWarps;
  for (int64_t i = int64_t{blockIdx.x} * kWarps + static_cast<int>(threadIdx.x) / kWarp; i < count;
       i += step) {
    const int head = static_cast<int>(i / tokens), t = static_cast<int>(i % tokens);
    body(head / heads, head % heads, t);
  }
}

__device__ int64_t code_index(const Cache& cache, int b, int h, int64_t j) {
  return b * cache.strides[0] + h * cache.strides[1] + j * cache.strides[2];
}
__device__ int64_t scale_index(const Cache& cache, int b, int h, int64_t j) {
  return b * cache.scale_strides[0] + h * cache.scale_strides[1] + j * cache.scale_strides[2];
}

__global__ void __launch_bounds__(kThreads)
    append_kernel(HeadRows x, Cache cache, Positions positions, int batch, int heads, int tokens,
                  int size, bool own_scale) {
  const int lane = threadIdx.x % kWarp;
  for_each_token(batch, heads, tokens, [&](int b, int h, int t) {
    const int64_t j = positions.data[b * positions.strides[0] + t * positions.strides[1]];
    if (j < 0 || j >= cache.capacity) return;
    const RowPart part = read_row(x, b, h, t, size);
    float* const place = cache.scale + scale_index(cache, b, h, j);
    float scale = 0.0f;
    if (own_scale) {
      const float divisor = cache.dtype == DType::kInt8 ? 127.0f : 448.0f;
      scale = symmetric_scale(warp_absmax(part), divisor, DType::kFloat32);
      if (lane == 0) *place = scale;
    } else {
      scale = *place;
    }
    const Quantizer quantize(cache.dtype, scale, 0, -127, 127);
#pragma unroll
    for (int c = 0; c < kRowChunks; ++c) {
      const int col = (lane + c * kWarp) * kChunk;
      if (col >= size) continue;
      store_codes(cache.codes + code_index(cache, b, h, j) + col, quantize(part.v[c]), kChunk);
    }
  });
}

template <typename Element>
__global__ void __launch_bounds__(kThreads)
    read_kernel(Cache cache, int batch, int heads, int begin, int tokens, int size, void* out) {
  const int lane = threadIdx.x % kWarp;
  for_each_token(batch, heads, tokens, [&](int b, int h, int t) {
    const Matrix row{cache.codes + code_index(cache, b, h, begin + t), cache.dtype, 1, size, 0, 1};
    const float scale = cache.scale[scale_index(cache, b, h, begin + t)];
    auto* const target = static_cast<typename Element::Storage*>(out) +
                         ((int64_t{b} * heads + h) * tokens + t) * size;
    for (int col = lane * kChunk; col < size; col += kWarp * kChunk) {
      const Words2 codes = load_codes(row, 0, col, kChunk);
      float values[kChunk];
#pragma unroll
      for (int i = 0; i < kChunk; ++i)
        values[i] = mul_rn(code_value(cache.dtype, codes.w[i / 4] >> (i % 4 * 8)), scale);
      store_chunk<Element>(target + col, values, kChunk);
    }
  });
}

}  // namespace

cudaError_t kv_append(const HeadRows& x, const Cache& cache, const int64_t* positions,
                      int64_t position_strides[2], int batch, int heads, int tokens, int size,
                      bool own_scale, cudaStream_t stream) {
  const int64_t count = int64_t{batch} * heads * tokens;
  if (count == 0 || size == 0) return cudaSuccess;
  const Positions places{positions, {position_strides[0], position_strides[1]}};
  return launch(append_kernel, dim3(grid_extent(ceil_div(count, kWarps))), dim3(kThreads), 0,
                stream, x, cache, places, batch, heads, tokens, size, own_scale);
}

cudaError_t kv_read(const Cache& cache, int batch, int heads, int begin, int end, int size,
                    DType dtype, void* out, cudaStream_t stream) {
  const int64_t count = int64_t{batch} * heads * (end - begin);
  if (count == 0 || size == 0) return cudaSuccess;
  return with_element(dtype, [&](auto element) {
    return launch(read_kernel<decltype(element)>, dim3(grid_extent(ceil_div(count, kWarps))),
                  dim3(kThreads), 0, stream, cache, batch, heads, begin, end - begin, size, out);
  });
}

}  // namespace qk::cuda
