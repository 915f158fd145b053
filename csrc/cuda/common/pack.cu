// Packing moves eight codes for each thread: one word of 4-bit numbers or two of 8-bit ones.
#include "cuda/common/pack.h"

#include "cuda/common/quantizer.h"

namespace qk::cuda {
namespace {

__global__ void __launch_bounds__(kThreads) pack_kernel(Matrix codes, CodeOutput out) {
  for_each_chunk(codes.rows, codes.cols, [&](int row, int col, int n) {
    out.store(row, col, load_codes(codes, row, col, n), n);
  });
}

// Nibbles 0..3 of a word as its bytes.
__device__ uint32_t spread_nibbles(uint32_t nibbles) {
  nibbles = (nibbles | nibbles << 8) & 0x00FF00FFu;
  return (nibbles | nibbles << 4) & 0x0F0F0F0Fu;
}

// u - 8 in each byte: the set top bit takes the borrow, and is flipped to where the sign belongs.
__device__ uint32_t minus_eight(uint32_t bytes) {
  return ((bytes | 0x80808080u) - 0x08080808u) ^ 0x80808080u;
}

__global__ void __launch_bounds__(kThreads)
    unpack_kernel(const uint8_t* words, int64_t row_bytes, int rows, int cols, int bits,
                  uint8_t* codes) {
  for_each_chunk(rows, cols, [&](int row, int col, int n) {
    const uint8_t* source = words + row * row_bytes + col * bits / 8;
    const uint32_t first = load_vector<uint32_t>(source);
    Words2 result;
    if (bits == 4) {
      result = Words2{
          {minus_eight(spread_nibbles(first & 0xFFFFu)), minus_eight(spread_nibbles(first >> 16))}};
    } else {
      result = Words2{
          {first ^ 0x80808080u, n > 4 ? load_vector<uint32_t>(source + 4) ^ 0x80808080u : 0u}};
    }
    store_codes(codes + static_cast<int64_t>(row) * cols + col, result, n);
  });
}

}  // namespace

cudaError_t pack_int32(const Matrix& codes, int bits, void* words, cudaStream_t stream) {
  if (codes.rows == 0 || codes.cols == 0) return cudaSuccess;
  const ChunkGrid over = chunk_grid(codes.rows, codes.cols);
  return launch(pack_kernel, over.grid, over.block, 0, stream, codes,
                code_output(words, codes.cols, bits));
}

cudaError_t unpack_int32(const void* words, int rows, int cols, int bits, void* codes,
                         cudaStream_t stream) {
  if (rows == 0 || cols == 0) return cudaSuccess;
  const ChunkGrid over = chunk_grid(rows, cols);
  return launch(unpack_kernel, over.grid, over.block, 0, stream, static_cast<const uint8_t*>(words),
                ceil_div(int64_t{cols} * bits, 32) * 4, rows, cols, bits,
                static_cast<uint8_t*>(codes));
}

}  // namespace qk::cuda
