// Error figures in two steps without atomics: each block of threads leaves four partial figures,
// one block joins them.
#include "cuda/common/error.h"

#include "cuda/common/quantizer.h"

namespace qk::cuda {
namespace {

struct Figures {
  double error = 0.0, source = 0.0;
  float largest_error = 0.0f, largest_source = 0.0f;

  __device__ void include(const Figures& other) {
    error += other.error;
    source += other.source;
    largest_error = max_nan(largest_error, other.largest_error);
    largest_source = max_nan(largest_source, other.largest_source);
  }
};

struct FigureScratch {
  Figures warps[kThreads / kWarp];
};

// The figures of all threads of the block, in thread 0.
__device__ Figures combine(Figures mine, FigureScratch& scratch) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    mine.include(Figures{shuffle_xor(mine.error, mask), shuffle_xor(mine.source, mask),
                         shuffle_xor(mine.largest_error, mask),
                         shuffle_xor(mine.largest_source, mask)});
  }
  const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  if (thread % kWarp == 0) scratch.warps[thread / kWarp] = mine;
  sync_block();
  if (thread == 0) {
    for (int warp = 1; warp < kThreads / kWarp; ++warp) mine.include(scratch.warps[warp]);
  }
  return mine;
}

__device__ void store_figures(double* out, const Figures& figures) {
  out[0] = figures.error;
  out[1] = figures.source;
  out[2] = static_cast<double>(figures.largest_error);
  out[3] = static_cast<double>(figures.largest_source);
}

template <typename Element>
__global__ void __launch_bounds__(kThreads)
    error_kernel(Matrix x, Matrix q, Blocks blocks, const float* scale, const int8_t* zero_point,
                 double* partial) {
  Figures figures;
  for_each_chunk(x.rows, x.cols, [&](int row, int col, int n) {
    const Chunk<Element> chunk = load_chunk<Element>(x, row, col, n);
    const Words2 codes = load_codes(q, row, col, n);
    const BlockIndex index(blocks, row, col, n);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (i >= n) break;
      const int at = index.one_block ? index.first : index.of(blocks, col + i);
      float value = code_value(q.dtype, codes.w[i / 4] >> (i % 4 * 8));
      if (zero_point != nullptr) value = sub_rn(value, static_cast<float>(zero_point[at]));
      const float source = chunk[i];
      const float error = sub_rn(source, mul_rn(value, scale[at]));
      figures.include(Figures{static_cast<double>(error) * static_cast<double>(error),
                              static_cast<double>(source) * static_cast<double>(source),
                              float_of(bits_of(error) & 0x7FFFFFFFu),
                              float_of(bits_of(source) & 0x7FFFFFFFu)});
    }
  });
  figures = combine(figures, shared<FigureScratch>());
  if (threadIdx.x == 0 && threadIdx.y == 0)
    store_figures(partial + int64_t{blockIdx.x} * 4, figures);
}

__global__ void __launch_bounds__(kThreads)
    join_kernel(const double* partial, int parts, double* out) {
  Figures figures;
  for (int part = threadIdx.x; part < parts; part += kThreads) {
    const double* p = partial + static_cast<int64_t>(part) * 4;
    figures.include(Figures{p[0], p[1], static_cast<float>(p[2]), static_cast<float>(p[3])});
  }
  figures = combine(figures, shared<FigureScratch>());
  if (threadIdx.x == 0) store_figures(out, figures);
}

// As many blocks of threads as the largest devices hold at once, whatever the device: the order of
// summation must not depend on it.
constexpr int kParts = 1024;

ChunkGrid error_grid(int rows, int cols) {
  ChunkGrid over = chunk_grid(rows, cols);
  over.grid = dim3(over.grid.x < kParts ? over.grid.x : kParts);
  return over;
}

}  // namespace

int error_workspace(int rows, int cols) {
  return static_cast<int>(error_grid(rows, cols).grid.x) * 4;
}

cudaError_t quantization_error(const Matrix& x, const Matrix& q, const Blocks& blocks,
                               const float* scale, const int8_t* zero_point, double* workspace,
                               double* out, cudaStream_t stream) {
  const ChunkGrid over = error_grid(x.rows, x.cols);
  const cudaError_t status = with_element(x.dtype, [&](auto element) {
    return launch(error_kernel<decltype(element)>, over.grid, over.block, sizeof(FigureScratch),
                  stream, x, q, blocks, scale, zero_point, workspace);
  });
  if (status != cudaSuccess) return status;
  return launch(join_kernel, dim3(1), dim3(kThreads), sizeof(FigureScratch), stream, workspace,
                static_cast<int>(over.grid.x), out);
}

}  // namespace qk::cuda
