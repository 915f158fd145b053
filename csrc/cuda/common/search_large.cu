// Scales of the least error for few large blocks: a block is cut into pieces that fit the caches of
// a multiprocessor, each leaves its errors by every candidate, and a warp for each block joins
// them.
#include "cuda/common/search_block.h"

namespace qk::cuda {
namespace {

constexpr int kPieceChunks = 4096;

__host__ __device__ int pieces_of(const Matrix& x, const Blocks& blocks) {
  const int rows = blocks.rows < x.rows ? blocks.rows : x.rows;
  const int cols = blocks.cols < x.cols ? blocks.cols : x.cols;
  const int64_t chunks = int64_t{rows} * ((cols + kChunk - 1) / kChunk);
  return static_cast<int>((chunks + kPieceChunks - 1) / kPieceChunks);
}

__device__ Range range_of(const ScaleSearch& how, const SearchRanges& ranges, int index) {
  const float high = ranges.high[index];
  return how.symmetric ? Range{-high, high} : Range{ranges.low[index], high};
}

// `sums` [block][piece][candidate].
template <typename Element>
__global__ void __launch_bounds__(kThreads)
    pieces_kernel(Matrix x, Blocks blocks, ScaleSearch how, SearchRanges ranges, double* sums) {
  SearchScratch& scratch = shared<SearchScratch>();
  const int pieces = pieces_of(x, blocks), all = tried(how);
  const int64_t work = int64_t{count(blocks)} * pieces;
  for (int64_t index = blockIdx.x; index < work; index += gridDim.x) {
    const int block = static_cast<int>(index / pieces);
    const int begin = static_cast<int>(index - int64_t{block} * pieces) * kPieceChunks;
    const Tile tile(x, blocks, block);
    const int end = min(tile.chunks, begin + kPieceChunks);
    const BlockSearch search(range_of(how, ranges, block));
    for (int candidate = 0; candidate < all; candidate += kTogether) {
      Candidate candidates[kTogether];
      search.prepare(how, candidate, candidates);
      Errors errors{};
      for (int chunk = begin + static_cast<int>(threadIdx.x); chunk < end; chunk += kThreads) {
        const auto at = tile.at(chunk);
        search.include(how, candidates, load_chunk<Element>(x, at.row, at.col, at.n), at.col, at.n,
                       errors);
      }
      errors = combine(errors, kThreads, scratch);
      if (threadIdx.x != 0) continue;
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        if (candidate + j < all) sums[index * all + candidate + j] = errors.v[j];
      }
    }
  }
}

__global__ void __launch_bounds__(kWarp)
    choose_kernel(Matrix x, Blocks blocks, ScaleSearch how, SearchRanges ranges, const double* sums,
                  float* scale, int8_t* zero_point, int* status) {
  const int pieces = pieces_of(x, blocks), all = tried(how);
  for (int block = blockIdx.x; block < count(blocks); block += static_cast<int>(gridDim.x)) {
    const BlockSearch search(range_of(how, ranges, block));
    double least = static_cast<double>(float_of(0x7F800000u));
    int best = 0;
    for (int i = threadIdx.x; i < all && all > 1; i += kWarp) {
      const double* from = sums + int64_t{block} * pieces * all + i;
      double sum = 0.0;
      for (int piece = 0; piece < pieces; ++piece) sum += from[int64_t{piece} * all];
      if (sum < least) {
        least = sum;
        best = i;
      }
    }
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
      const double other = shuffle_xor(least, mask);
      const int index = shuffle_xor(best, mask);
      if (other < least || (other == least && index < best)) {
        least = other;
        best = index;
      }
    }
    if (threadIdx.x != 0) continue;
    if (!search.finite()) atomic_or(status, kBadValue);
    const ScaleAndZero found = search.scale_of(how, best);
    scale[block] = found.scale;
    if (!how.symmetric) zero_point[block] = static_cast<int8_t>(found.zero_point);
  }
}

__global__ void __launch_bounds__(kThreads)
    check_importance_kernel(const float* importance, int n, int* status) {
  for (int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x); i < n;
       i += static_cast<int>(gridDim.x) * kThreads) {
    if (!(importance[i] >= 0.0f && importance[i] < float_of(0x7F800000u)))
      atomic_or(status, kBadImportance);
  }
}

}  // namespace

cudaError_t check_importance(const float* importance, int n, int* status, cudaStream_t stream) {
  return launch(check_importance_kernel, dim3(grid_extent(ceil_div(n, kThreads))), dim3(kThreads),
                0, stream, importance, n, status);
}

int64_t search_workspace(const Matrix& x, const Blocks& blocks, const ScaleSearch& how) {
  return int64_t{count(blocks)} * pieces_of(x, blocks) * tried(how);
}

cudaError_t search_large_scales(const Matrix& x, const Blocks& blocks, const ScaleSearch& how,
                                const SearchRanges& ranges, double* workspace, float* scale,
                                int8_t* zero_point, int* status, cudaStream_t stream) {
  const cudaError_t launched = with_element(x.dtype, [&](auto element) {
    const int64_t work = int64_t{count(blocks)} * pieces_of(x, blocks);
    return launch(pieces_kernel<decltype(element)>, dim3(grid_extent(work)), dim3(kThreads),
                  sizeof(SearchScratch), stream, x, blocks, how, ranges, workspace);
  });
  if (launched != cudaSuccess) return launched;
  return launch(choose_kernel, dim3(grid_extent(count(blocks))), dim3(kWarp), 0, stream, x, blocks,
                how, ranges, workspace, scale, zero_point, status);
}

}  // namespace qk::cuda
