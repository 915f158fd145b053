// The search of AWQ on the Gram matrix. Errors are made once for each candidate, in the arithmetic
// of the CPU kernels, and kept in fp32 while tiles of (E g) * E are summed: making them anew for
// each tile of g would cost as much as the products.
//
// The products run on the tensor cores, in bf16 halves of both sides: high * high + high * low +
// low * high leaves out terms of 2^-16, which loud channels in g cannot make count. g is symmetric:
// tiles above the diagonal count twice, those below not at all.
#include "cuda/common/awq.h"

#include "cuda/common/mma.h"
#include "cuda/common/quantizer.h"

namespace qk::cuda {
namespace {

// --- errors

__device__ Range range_of(const float (&values)[kChunk], int n) {
  Range range;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    if (i < n) range.include(Range{values[i], values[i]});
  }
  return range;
}

template <typename Element>
__global__ void __launch_bounds__(kMaxTeam)
    errors_kernel(Matrix w, Blocks blocks, AwqQuantizer how, AwqCandidates candidates,
                  float* errors, int64_t stride, int team) {
  TeamScratch& scratch = shared<TeamScratch>();
  const int teams = static_cast<int>(blockDim.x) / team;
  const int mine = static_cast<int>(threadIdx.x) / team;
  const int lane = static_cast<int>(threadIdx.x) - mine * team;
  const int64_t all = int64_t{candidates.count} * count(blocks);
  const int64_t step = int64_t{gridDim.x} * teams;
  for (int64_t first = int64_t{blockIdx.x} * teams; first < all; first += step) {
    const int64_t index = first + mine;
    const bool exists = index < all;
    const int candidate = exists ? static_cast<int>(index / count(blocks)) : 0;
    const Tile tile(
        w, blocks,
        exists ? static_cast<int>(index - int64_t{candidate} * count(blocks)) : count(blocks));
    const int pair = candidates.first + candidate;
    const int vector = pair / candidates.clips;
    const float clip = candidates.clip[pair - vector * candidates.clips];
    const float* const scales = candidates.scales + vector * candidates.stride;
    const auto load = [&](int chunk, float (&values)[kChunk]) {
      const auto at = tile.at(chunk);
      const Chunk<Element> x = load_chunk<Element>(w, at.row, at.col, at.n);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        values[i] = i < at.n ? mul_rn(x[i], scales[at.col + i]) : 0.0f;
      }
      return at;
    };
    float values[kChunk];
    Range range;
    for (int chunk = lane; chunk < tile.chunks; chunk += team) {
      const auto at = load(chunk, values);
      range.include(range_of(values, at.n));
    }
    range = combine(range, team, scratch).finished();

    ScaleAndZero found{0.0f, 0};
    if (how.symmetric) {
      found.scale = symmetric_scale(mul_rn(range.absmax(), clip), how.divisor, how.scale_dtype);
    } else {
      found = asymmetric_scale(Range{mul_rn(range.low, clip), mul_rn(range.high, clip)}, how.q_min,
                               how.q_max, how.scale_dtype);
    }
    const Quantizer quantize(DType::kInt8, found.scale, found.zero_point, how.q_min, how.q_max);
    float* const out = errors + int64_t{candidate} * w.rows * stride;
    for (int chunk = lane; chunk < tile.chunks; chunk += team) {
      const auto at = load(chunk, values);
      float* const row = out + at.row * stride + at.col;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const int code = static_cast<int>(quantize.integer(values[i])) - found.zero_point;
        const float error = fma_rn(static_cast<float>(code), found.scale, -values[i]);
        if (i < at.n) row[i] = mul_rn(error, div_rn(1.0f, scales[at.col + i]));
      }
      if (at.col + at.n == w.cols) {
        for (int i = at.n; at.col + i < stride; ++i) row[i] = 0.0f;
      }
    }
  }
}

// --- losses

struct Halves {
  uint32_t high[2], low[2];  // pairs of bf16 numbers
};

// Four floats as sums of two bf16 numbers each, but for 2^-17 of them.
__device__ Halves halves_of(const Words4& four) {
  Halves halves;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float a = float_of(four.w[2 * i]), b = float_of(four.w[2 * i + 1]);
    const uint32_t high = narrow_bfloat16x2(a, b);
    halves.high[i] = high;
    halves.low[i] =
        narrow_bfloat16x2(sub_rn(a, float_of(high << 16)), sub_rn(b, float_of(high & 0xFFFF0000u)));
  }
  return halves;
}

// Two slices of depth 16: while one is multiplied, the next is on its way in registers.
constexpr int kStep = kMmaDepth / 2;

struct LossTiles {
  uint16_t left[2][kMmaTile][kMmaDeep];   // errors [high, low][row][depth]
  uint16_t right[2][kMmaDepth][kMmaRow];  // g [high, low][depth][column]
};

// Which tile it is. In shared memory while it is multiplied, when registers are few; 32 bits are
// enough for tiles whose errors lie in memory.
struct LossPlace {
  unsigned index;
  const float* errors;  // of its candidate, from its first row on
  int row, col;
};

struct LossScratch {
  LossTiles tiles;
  double warps[kThreads / kWarp];
  LossPlace place;
};

__global__ void __launch_bounds__(kThreads, 2)
    loss_kernel(const float* errors, int64_t stride, int count, int rows, int cols, const float* g,
                int64_t g_stride, double* parts) {
  LossScratch& scratch = shared<LossScratch>();
  const int thread = threadIdx.x;
  const int row_tiles = (rows + kMmaTile - 1) / kMmaTile, edge = (cols + kMmaTile - 1) / kMmaTile;
  const unsigned all = static_cast<unsigned>(count) * row_tiles * edge;
  for (unsigned index = blockIdx.x; index < all;) {
    // Tiles far to the right have the most work: they go first.
    const unsigned place = index / (static_cast<unsigned>(count) * row_tiles);
    const unsigned panel = index - place * count * row_tiles;
    const int col = (edge - 1 - static_cast<int>(place)) * kMmaTile;
    const int64_t candidate = panel / row_tiles;
    const int row = static_cast<int>(panel - candidate * row_tiles) * kMmaTile;
    const float* const own = errors + (candidate * rows + row) * stride;
    const int depth = min(col + kMmaTile, cols);

    Words4 left[2], right[2];
    const auto load = [&](int k) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int r = thread / 4 + i * 64, at = k + thread % 4 * 4;
        // Rows of errors are aligned, and zeros follow their last column.
        left[i] = row + r < rows && at < depth ? load_vector<Words4>(own + r * stride + at)
                                               : Words4{{0, 0, 0, 0}};
        const int from = k + thread / 32 + i * 8, c = col + thread % 32 * 4;
        right[i] = load_four(g + from * g_stride + c, from < depth ? cols - c : 0);
      }
    };
    const auto store = [&](int step) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Halves a = halves_of(left[i]), b = halves_of(right[i]);
        const int r = thread / 4 + i * 64, at = step + thread % 4 * 4;
        const int from = step + thread / 32 + i * 8, c = thread % 32 * 4;
        store_vector(&scratch.tiles.left[0][r][at], Words2{{a.high[0], a.high[1]}});
        store_vector(&scratch.tiles.left[1][r][at], Words2{{a.low[0], a.low[1]}});
        store_vector(&scratch.tiles.right[0][from][c], Words2{{b.high[0], b.high[1]}});
        store_vector(&scratch.tiles.right[1][from][c], Words2{{b.low[0], b.low[1]}});
      }
    };
    const WarpTile warp;
    Sums sums[2][8];
    load(0);
    store(0);
    if (thread == 0) scratch.place = {index, own, row, col};
    sync_block();
    for (int k = 0, step = 0; k < depth; k += kStep, step ^= kStep) {
      const bool more = k + kStep < depth;
      if (more) load(k + kStep);
      if (k == col) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
          for (int n = 0; n < 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[m][n].v[i] = add_rn(sums[m][n].v[i], sums[m][n].v[i]);
          }
        }
      }
      Left high[2], low[2];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        high[m] = left_of_rows(scratch.tiles.left[0], warp.row + m * 16, step);
        low[m] = left_of_rows(scratch.tiles.left[1], warp.row + m * 16, step);
      }
#pragma unroll
      for (int n = 0; n < 8; n += 2) {
        const RightPair most = right_of_columns(scratch.tiles.right[0], warp.col + n * 8, step);
        const RightPair rest = right_of_columns(scratch.tiles.right[1], warp.col + n * 8, step);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          multiply_add<BFloat16>(sums[m][n], high[m], most.first);
          multiply_add<BFloat16>(sums[m][n + 1], high[m], most.second);
          multiply_add<BFloat16>(sums[m][n], low[m], most.first);
          multiply_add<BFloat16>(sums[m][n + 1], low[m], most.second);
          multiply_add<BFloat16>(sums[m][n], high[m], rest.first);
          multiply_add<BFloat16>(sums[m][n + 1], high[m], rest.second);
        }
      }
      if (more) store(step ^ kStep);
      sync_block();
    }
    const LossPlace at = scratch.place;
    double loss = 0.0;
    warp.each(sums, [&](int r, int c, float sum) {
      if (at.row + r < rows && at.col + c < cols)
        loss += static_cast<double>(sum) * static_cast<double>(at.errors[r * stride + at.col + c]);
    });
    for (int mask = kWarp / 2; mask > 0; mask /= 2) loss += shuffle_xor(loss, mask);
    if (thread % kWarp == 0) scratch.warps[thread / kWarp] = loss;
    sync_block();
    if (thread == 0) {
      for (int i = 1; i < kThreads / kWarp; ++i) loss += scratch.warps[i];
      parts[at.index] = loss;
    }
    index = at.index + gridDim.x;
  }
}

__global__ void __launch_bounds__(kWarp)
    join_losses_kernel(const double* parts, int count, int row_tiles, int edge, float* losses) {
  for (int candidate = blockIdx.x; candidate < count; candidate += static_cast<int>(gridDim.x)) {
    double sum = 0.0;
    for (int i = threadIdx.x; i < row_tiles * edge; i += kWarp) {
      const int row_tile = i / edge, place = edge - 1 - i % edge;  // as loss_kernel counts them
      sum += parts[(int64_t{place} * count + candidate) * row_tiles + row_tile];
    }
    for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    const float loss = static_cast<float>(sum);
    if (threadIdx.x == 0) losses[candidate] = is_finite(loss) ? loss : float_of(0x7F800000u);
  }
}

int64_t tiles_of(int rows, int cols) { return ceil_div(rows, kMmaTile) * ceil_div(cols, kMmaTile); }

}  // namespace

cudaError_t awq_errors(const Matrix& w, const AwqQuantizer& how, const AwqCandidates& candidates,
                       float* errors, int64_t stride, cudaStream_t stream) {
  const Blocks blocks{1, how.group, w.rows, static_cast<int>(ceil_div(w.cols, how.group))};
  return with_element(w.dtype, [&](auto element) {
    const int team = team_for(ceil_div(how.group, kChunk));
    const int threads = team > kWarp ? team : kThreads;
    const int64_t wanted = ceil_div(int64_t{candidates.count} * count(blocks), threads / team);
    return launch(errors_kernel<decltype(element)>, dim3(grid_extent(wanted)),
                  dim3(static_cast<unsigned>(threads)), sizeof(TeamScratch), stream, w, blocks, how,
                  candidates, errors, stride, team);
  });
}

int64_t awq_workspace(int count, int rows, int cols) { return count * tiles_of(rows, cols); }

cudaError_t awq_losses(const float* errors, int64_t stride, int count, int rows, int cols,
                       const float* g, int64_t g_stride, double* workspace, float* losses,
                       cudaStream_t stream) {
  const int64_t each = tiles_of(rows, cols);
  const cudaError_t status =
      launch(loss_kernel, dim3(grid_extent(count * each)), dim3(kThreads), sizeof(LossScratch),
             stream, errors, stride, count, rows, cols, g, g_stride, workspace);
  if (status != cudaSuccess) return status;
  return launch(join_losses_kernel, dim3(grid_extent(count)), dim3(kWarp), 0, stream, workspace,
                count, static_cast<int>(ceil_div(rows, kMmaTile)),
                static_cast<int>(ceil_div(cols, kMmaTile)), losses);
}

}  // namespace qk::cuda
