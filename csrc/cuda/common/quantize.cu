// Elementwise quantize and dequantize, one chunk of eight elements for each thread.
#include "cuda/common/quantize.h"

#include "cuda/common/quantizer.h"

namespace qk::cuda {
namespace {

template <typename Element>
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(Matrix x, QuantizeArgs args, CodeOutput out) {
  for_each_chunk(x.rows, x.cols, [&](int row, int col, int n) {
    const Chunk<Element> chunk = load_chunk<Element>(x, row, col, n);
    const BlockIndex index(args.blocks, row, col, n);
    const auto quantizer = [&](int at) {
      const int zero_point = args.zero_point == nullptr ? 0 : args.zero_point[at];
      return Quantizer(args.code, args.scale[at], zero_point, args.q_min, args.q_max);
    };
    if (index.one_block) {
      out.store(row, col, quantizer(index.first)(chunk), n);
      return;
    }
    Words2 codes{{0, 0}};
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (i >= n) break;
      codes.w[i / 4] |= quantizer(index.of(args.blocks, col + i)).one(chunk[i]) << (i % 4 * 8);
    }
    out.store(row, col, codes, n);
  });
}

template <typename Element>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(Matrix q, Blocks blocks, const float* scale, const int8_t* zero_point,
                      void* out) {
  for_each_chunk(q.rows, q.cols, [&](int row, int col, int n) {
    const Words2 codes = load_codes(q, row, col, n);
    const BlockIndex index(blocks, row, col, n);
    float values[kChunk];
    const auto value = [&](int i, int at) {
      const float code = code_value(q.dtype, codes.w[i / 4] >> (i % 4 * 8));
      const float zero = zero_point == nullptr ? 0.0f : static_cast<float>(zero_point[at]);
      return mul_rn(zero_point == nullptr ? code : sub_rn(code, zero), scale[at]);
    };
    if (index.one_block) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) values[i] = value(i, index.first);
    } else {
#pragma unroll
      for (int i = 0; i < kChunk; ++i)
        values[i] = value(i, index.of(blocks, col + (i < n ? i : 0)));
    }
    using Storage = typename Element::Storage;
    store_chunk<Element>(static_cast<Storage*>(out) + static_cast<int64_t>(row) * q.cols + col,
                         values, n);
  });
}

}  // namespace

cudaError_t quantize(const Matrix& x, const QuantizeArgs& args, void* out, cudaStream_t stream) {
  if (x.rows == 0 || x.cols == 0) return cudaSuccess;
  return with_element(x.dtype, [&](auto element) {
    const ChunkGrid over = chunk_grid(x.rows, x.cols);
    return launch(quantize_kernel<decltype(element)>, over.grid, over.block, 0, stream, x, args,
                  code_output(out, x.cols, args.pack_bits));
  });
}

cudaError_t dequantize(const Matrix& q, const Blocks& blocks, const float* scale,
                       const int8_t* zero_point, void* out, DType out_dtype, cudaStream_t stream) {
  if (q.rows == 0 || q.cols == 0) return cudaSuccess;
  return with_element(out_dtype, [&](auto element) {
    const ChunkGrid over = chunk_grid(q.rows, q.cols);
    return launch(dequantize_kernel<decltype(element)>, over.grid, over.block, 0, stream, q, blocks,
                  scale, zero_point, out);
  });
}

}  // namespace qk::cuda
