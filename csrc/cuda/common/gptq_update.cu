// The GPTQ sweep's matrix product: how a stripe makes up for all columns before it.
// Tiles of 64 x 64, 8 x 4 in the registers of a thread, the next depth of 16 on its way while one
// is multiplied. Each sum has the order of the columns, with one rounding for each (see gptq.cu).
#include "cuda/common/gptq.h"

#include "cuda/common/chunk.h"

namespace qk::cuda {
namespace {

// --- what comes first

__global__ void __launch_bounds__(kThreads) prepare_kernel(Sweep sweep) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  const int64_t first = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t all_rows = int64_t{sweep.batch} * sweep.rows;
  for (int64_t i = first; i < all_rows * sweep.stride; i += step) {
    const int64_t row = i / sweep.stride, col = i - row * sweep.stride;
    const int64_t b = row / sweep.rows;
    float value = 0.0f;
    if (col < sweep.cols)
      value = sweep.w[b * sweep.w_batch + (row - b * sweep.rows) * sweep.w_stride + col];
    if (!is_finite(value)) atomic_or(sweep.status, kSweepBadWeight);
    sweep.values[i] = value;
  }
  for (int64_t i = first; i < all_rows; i += step) sweep.loss[i] = 0.0f;
  for (int64_t i = first; i < int64_t{sweep.factors} * sweep.cols; i += step) {
    const int64_t b = i / sweep.cols, col = i - b * sweep.cols;
    const float d = sweep.factor[b * sweep.factor_batch + col * (sweep.factor_stride + 1)];
    if (!(d > 0.0f) || !is_finite(d)) atomic_or(sweep.status, kSweepBadDiagonal);
    sweep.diagonal[i] = d;
  }
  if (sweep.g_idx == nullptr) return;
  for (int64_t i = first; i < sweep.cols; i += step) {
    if (sweep.g_idx[i] < 0 || sweep.g_idx[i] >= sweep.groups)
      atomic_or(sweep.status, kSweepBadGroup);
  }
}

__global__ void __launch_bounds__(kThreads) share_kernel(Sweep sweep, int width) {
  const int64_t depth = sweep.origin + width, each = depth * sweep.share_stride;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < sweep.factors * each;
       i += step) {
    const int64_t b = i / each, k = (i - b * each) / sweep.share_stride;
    const int c = static_cast<int>(i - b * each - k * sweep.share_stride);
    float share = 0.0f;
    if (c < width) {
      const float* const row = sweep.factor + b * sweep.factor_batch + k * sweep.factor_stride;
      share = div_rn(row[sweep.origin + c], sweep.diagonal[b * sweep.cols + sweep.origin + c]);
    }
    sweep.share[(b * sweep.cols + k) * sweep.share_stride + c] = share;
  }
}

// --- making up for earlier columns

constexpr int kUpdateThreads = 128;
constexpr int kTile = 64, kDepth = 16;
constexpr int kTileRow = kTile + 4;  // fewer bank conflicts where `fell` is transposed

struct UpdateScratch {
  float fell[kDepth][kTileRow];  // [column before][row]
  float factors[kDepth][kTile];  // [column before][column]
};

__global__ void __launch_bounds__(kUpdateThreads)
    update_kernel(Sweep sweep, int first, int width, int begin, int end) {
  UpdateScratch& scratch = shared<UpdateScratch>();
  const int thread = threadIdx.x;
  const int row_tiles = (sweep.rows + kTile - 1) / kTile, col_tiles = (width + kTile - 1) / kTile;
  const int64_t tiles = int64_t{sweep.batch} * row_tiles * col_tiles;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t panel = tile / col_tiles, b = panel / row_tiles;
    const int row = static_cast<int>(panel - b * row_tiles) * kTile;
    const int col = static_cast<int>(tile - panel * col_tiles) * kTile;
    float* const values = sweep.values + (b * sweep.rows + row) * sweep.stride;
    const float* const share = sweep.share + sweep.factor_of(b) * sweep.cols * sweep.share_stride +
                               (first - sweep.origin + col);
    const int rows = min(sweep.rows - row, kTile), cols = min(width - col, kTile);

    // What this thread brings: two runs of four of a row that fell, two of four factors.
    const auto load_fell = [&](int k, int part) {
      const int r = thread / 4 + part * 32, at = k + thread % 4 * 4;
      return load_four(values + r * sweep.stride + at, r < rows ? end - at : 0);
    };
    const auto load_factors = [&](int k, int part) {
      const int at = k + thread / 16 + part * 8, c = thread % 16 * 4;
      return load_four(share + at * sweep.share_stride + c, at < end ? cols - c : 0);
    };
    const int mine = thread / 16 * 8, from = thread % 16 * 4;
    float sum[8][4];
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      const Words4 four = load_four(values + (mine + r) * sweep.stride + first + col + from,
                                    mine + r < rows ? cols - from : 0);
#pragma unroll
      for (int c = 0; c < 4; ++c) sum[r][c] = float_of(four.w[c]);
    }
    Words4 fell[2], factors[2];
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      fell[part] = load_fell(begin, part);
      factors[part] = load_factors(begin, part);
    }
    for (int k = begin; k < end; k += kDepth) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          scratch.fell[thread % 4 * 4 + i][thread / 4 + part * 32] = float_of(fell[part].w[i]);
        }
        store_vector(&scratch.factors[thread / 16 + part * 8][thread % 16 * 4], factors[part]);
      }
      sync_block();
      if (k + kDepth < end) {
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          fell[part] = load_fell(k + kDepth, part);
          factors[part] = load_factors(k + kDepth, part);
        }
      }
#pragma unroll
      for (int i = 0; i < kDepth; ++i) {
        const Words4 above = load_vector<Words4>(&scratch.fell[i][mine]);
        const Words4 below = load_vector<Words4>(&scratch.fell[i][mine + 4]);
        const Words4 right = load_vector<Words4>(&scratch.factors[i][from]);
#pragma unroll
        for (int r = 0; r < 8; ++r) {
          const float left = float_of(r < 4 ? above.w[r % 4] : below.w[r % 4]);
#pragma unroll
          for (int c = 0; c < 4; ++c) sum[r][c] = fma_rn(left, float_of(right.w[c]), sum[r][c]);
        }
      }
      sync_block();
    }
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      store_four(values + (mine + r) * sweep.stride + first + col + from, sum[r],
                 mine + r < rows ? cols - from : 0);
    }
  }
}

}  // namespace

cudaError_t sweep_prepare(const Sweep& sweep, cudaStream_t stream) {
  const int64_t work = int64_t{sweep.batch} * sweep.rows * sweep.stride;
  return launch(prepare_kernel, dim3(grid_extent(ceil_div(work, kThreads * 4))), dim3(kThreads), 0,
                stream, sweep);
}

cudaError_t sweep_share(const Sweep& sweep, int width, cudaStream_t stream) {
  const int64_t work = sweep.factors * int64_t{sweep.origin + width} * sweep.share_stride;
  return launch(share_kernel, dim3(grid_extent(ceil_div(work, kThreads * 4))), dim3(kThreads), 0,
                stream, sweep, width);
}

cudaError_t sweep_update(const Sweep& sweep, int first, int width, int begin, int end,
                         cudaStream_t stream) {
  if (begin >= end) return cudaSuccess;
  const int64_t tiles = sweep.batch * ceil_div(sweep.rows, kTile) * ceil_div(width, kTile);
  return launch(update_kernel, dim3(grid_extent(tiles)), dim3(kUpdateThreads),
                sizeof(UpdateScratch), stream, sweep, first, width, begin, end);
}

}  // namespace qk::cuda
