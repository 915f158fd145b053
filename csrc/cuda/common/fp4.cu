// FP4 quantization and its inverse: eight columns, four bytes of codes, for each thread.
#include "cuda/common/fp4.h"

#include "cuda/common/chunk.h"

namespace qk::cuda {
namespace {

// Ties go to the value with an even index. NaN compares with nothing, so it becomes zero.
__device__ uint32_t float4_from(float value) {
  const float size = float_of(bits_of(value) & 0x7FFFFFFFu);
  const uint32_t index = (size > 0.25f) + (size >= 0.75f) + (size > 1.25f) + (size >= 1.75f) +
                         (size > 2.5f) + (size >= 3.5f) + (size > 5.0f);
  return index | (value < 0.0f ? 8u : 0u);
}

// The e4m3 code of each of the four nibbles in the lower half of a word, one to a byte.
__device__ uint32_t float8_of_float4(uint32_t half) {
  uint32_t result = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t index = half >> (4 * i) & 7u, sign = (half >> (4 * i) & 8u) << 4;
    const uint32_t code = index == 0 ? 0u : index == 1 ? 0x30u : 0x30u + 4 * index;
    result |= (sign | code) << (8 * i);
  }
  return result;
}

template <typename Element>
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(Matrix x, const float* scale, int scale_cols, int group, uint8_t* out) {
  for_each_chunk(x.rows, x.cols, [&](int row, int col, int n) {
    const Chunk<Element> chunk = load_chunk<Element>(x, row, col, n);
    const float* scales = scale + static_cast<int64_t>(row) * scale_cols;
    uint32_t codes = 0;
#pragma unroll
    for (int i = 0; i < kChunk; i += 2) {
      if (i >= n) break;
      const float step = scales[(col + i) / group];
      codes |= (float4_from(div_rn(chunk[i], step)) | float4_from(div_rn(chunk[i + 1], step)) << 4)
               << (4 * i);
    }
    uint8_t* target = out + static_cast<int64_t>(row) * (x.cols / 2) + col / 2;
    if (n == kChunk && aligned_to(target, 4)) {
      store_vector(target, codes);
      return;
    }
    for (int i = 0; i < n / 2; ++i) target[i] = static_cast<uint8_t>(codes >> (8 * i));
  });
}

__global__ void __launch_bounds__(kThreads)
    unpack_kernel(const uint8_t* bytes, int64_t row_stride, int rows, int cols, uint8_t* codes) {
  for_each_chunk(rows, cols, [&](int row, int col, int n) {
    const uint8_t* source = bytes + row * row_stride + col / 2;
    uint32_t word = 0;
    if (n == kChunk && aligned_to(source, 4)) {
      word = load_vector<uint32_t>(source);
    } else {
      for (int i = 0; i < n / 2; ++i) word |= static_cast<uint32_t>(source[i]) << (8 * i);
    }
    const Words2 result{{float8_of_float4(word & 0xFFFFu), float8_of_float4(word >> 16)}};
    store_codes(codes + static_cast<int64_t>(row) * cols + col, result, n);
  });
}

}  // namespace

cudaError_t quantize_fp4(const Matrix& x, const float* scale, int scale_cols, int group,
                         void* bytes, cudaStream_t stream) {
  if (x.rows == 0 || x.cols == 0) return cudaSuccess;
  return with_element(x.dtype, [&](auto element) {
    const ChunkGrid over = chunk_grid(x.rows, x.cols);
    return launch(quantize_kernel<decltype(element)>, over.grid, over.block, 0, stream, x, scale,
                  scale_cols, group, static_cast<uint8_t*>(bytes));
  });
}

cudaError_t unpack_fp4(const void* bytes, int64_t row_stride, int rows, int cols, void* codes,
                       cudaStream_t stream) {
  if (rows == 0 || cols == 0) return cudaSuccess;
  const ChunkGrid over = chunk_grid(rows, cols);
  return launch(unpack_kernel, over.grid, over.block, 0, stream, static_cast<const uint8_t*>(bytes),
                row_stride, rows, cols, static_cast<uint8_t*>(codes));
}

}  // namespace qk::cuda
