// Blocked min / max / absmax of a matrix [rows, cols] of fp32, fp16 or bf16; each element is read
// once.
//
// reduce_tiles_kernel: a team of 1 to 512 threads for each block, chunks of the block dealt out in
// turn. reduce_columns_kernel: blocks one column wide. A warp reads 256 neighbouring columns of a
// row, eight warps share the rows, and a tree in shared memory brings the warps together.
#include "cuda/common/reduce.h"

#include "cuda/common/quantizer.h"

namespace qk::cuda {
namespace {

__device__ void store_range(const ReduceOutput& out, int64_t index, const Range& range) {
  if (out.absmax != nullptr) out.absmax[index] = range.absmax();
  if (out.low != nullptr) out.low[index] = range.low;
  if (out.high != nullptr) out.high[index] = range.high;
}

template <typename Element>
__global__ void __launch_bounds__(kMaxTeam)
    reduce_tiles_kernel(Matrix x, Blocks blocks, ReduceOutput out, int team) {
  TeamScratch& scratch = shared<TeamScratch>();
  const int teams = static_cast<int>(blockDim.x) / team;
  const int mine = static_cast<int>(threadIdx.x) / team;
  const int lane = static_cast<int>(threadIdx.x) - mine * team;
  const int step = static_cast<int>(gridDim.x) * teams;
  for (int first = static_cast<int>(blockIdx.x) * teams; first < count(blocks); first += step) {
    const Tile tile(x, blocks, first + mine);
    Range range;
#pragma unroll 4
    for (int chunk = lane; chunk < tile.chunks; chunk += team) {
      const auto at = tile.at(chunk);
      range.include(load_chunk<Element>(x, at.row, at.col, at.n));
    }
    range = combine(range, team, scratch).finished();
    if (lane == 0 && tile.rows > 0) store_range(out, first + mine, range);
  }
}

constexpr int kColumnWarps = kThreads / kWarp;

struct ColumnScratch {
  Range ranges[kColumnWarps][kChunk][kWarp];  // lanes innermost: no bank conflicts
};

template <typename Element>
__global__ void __launch_bounds__(kThreads)
    reduce_columns_kernel(Matrix x, Blocks blocks, ReduceOutput out) {
  ColumnScratch& scratch = shared<ColumnScratch>();
  const int lane = threadIdx.x, warp = threadIdx.y;
  const int col_step = static_cast<int>(gridDim.x) * kWarp * kChunk;
  for (int grid_row = blockIdx.y; grid_row < blocks.grid_rows; grid_row += gridDim.y) {
    const int end = min((grid_row + 1) * blocks.rows, x.rows);
    for (int first = static_cast<int>(blockIdx.x) * kWarp * kChunk; first < x.cols;
         first += col_step) {
      const int col = first + lane * kChunk;
      const int n = min(x.cols - col, kChunk);
      Range ranges[kChunk];
      if (n > 0) {
#pragma unroll 4
        for (int row = grid_row * blocks.rows + warp; row < end; row += kColumnWarps) {
          const Chunk<Element> chunk = load_chunk<Element>(x, row, col, n);
#pragma unroll
          for (int i = 0; i < kChunk; ++i) ranges[i].include(Range{chunk[i], chunk[i]});
        }
      }
#pragma unroll
      for (int i = 0; i < kChunk; ++i) scratch.ranges[warp][i][lane] = ranges[i];
      sync_block();
      for (int half = kColumnWarps / 2; half > 0; half /= 2) {
        if (warp < half) {
#pragma unroll
          for (int i = 0; i < kChunk; ++i) {
            ranges[i].include(scratch.ranges[warp + half][i][lane]);
            scratch.ranges[warp][i][lane] = ranges[i];
          }
        }
        sync_block();
      }
      if (warp == 0) {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          if (i < n) store_range(out, static_cast<int64_t>(grid_row) * x.cols + col + i, ranges[i]);
        }
      }
    }
  }
}

// About this many elements for each block of threads in the first of two steps.
constexpr int kTileElements = 32768;
constexpr int kColumnTileRows = 128;

}  // namespace

ReducePlan plan_reduce(int rows, int cols, const Blocks& blocks) {
  Blocks tiles = blocks;
  if (blocks.cols == 1) {
    if (blocks.grid_rows == 1) tiles.rows = kColumnTileRows;
  } else {
    if (blocks.grid_cols == 1 && blocks.cols > kTileElements) tiles.cols = kTileElements;
    const int64_t tile_rows = kTileElements / tiles.cols;
    if (blocks.grid_rows == 1 && blocks.rows > tile_rows)
      tiles.rows = static_cast<int>(tile_rows > 1 ? tile_rows : 1);
  }
  tiles.grid_rows = static_cast<int>(ceil_div(rows, tiles.rows));
  tiles.grid_cols = static_cast<int>(ceil_div(cols, tiles.cols));
  const Blocks rest{tiles.grid_rows / blocks.grid_rows, tiles.grid_cols / blocks.grid_cols,
                    blocks.grid_rows, blocks.grid_cols};
  return {tiles, rest, tiles.grid_rows != blocks.grid_rows || tiles.grid_cols != blocks.grid_cols};
}

cudaError_t reduce(const Matrix& x, const Blocks& blocks, const ReduceOutput& out,
                   cudaStream_t stream) {
  if (count(blocks) == 0) return cudaSuccess;
  return with_element(x.dtype, [&](auto element) {
    using Element = decltype(element);
    if (blocks.cols == 1 && x.cols > 1) {
      const dim3 grid(grid_extent(ceil_div(x.cols, kWarp * kChunk)), grid_extent(blocks.grid_rows));
      return launch(reduce_columns_kernel<Element>, grid, dim3(kWarp, kColumnWarps),
                    sizeof(ColumnScratch), stream, x, blocks, out);
    }
    const int team = team_for(int64_t{blocks.rows} * ceil_div(blocks.cols, kChunk));
    const int threads = team > kWarp ? team : kThreads;
    const unsigned grid = grid_extent(ceil_div(count(blocks), threads / team));
    return launch(reduce_tiles_kernel<Element>, dim3(grid), dim3(static_cast<unsigned>(threads)),
                  sizeof(TeamScratch), stream, x, blocks, out, team);
  });
}

}  // namespace qk::cuda
