// The Gram matrix of tokens. A block of threads makes one tile of the upper half, from two stripes
// of x that it walks down, token by token; the tile is written twice, once mirrored.
//
// gram_kernel: 16-bit numbers on the tensor cores, tiles of 128 x 128, products exact and sums
// fp32. Both stripes lie in shared memory as they lie in x, and ldmatrix transposes them; two
// stages, so that one barrier for each 32 tokens is enough. gram_float_kernel: fp32 numbers, tiles
// of 64 x 64, 8 x 4 in the registers of a thread.
#include "cuda/common/gram.h"

#include "cuda/common/mma.h"

namespace qk::cuda {
namespace {

__device__ bool counts(const TokenMask& mask, int token) {
  return mask.data == nullptr || mask.data[token * mask.stride];
}

// Eight columns of a token; zeros beyond the matrix, and of a token that does not count.
template <typename Element>
__device__ Chunk<Element> load_token(const Matrix& x, bool there, int token, int col) {
  Chunk<Element> chunk{};
  const int n = x.cols - col;
  if (n <= 0 || !there) return chunk;
  chunk = load_chunk<Element>(x, token, col, n < kChunk ? n : kChunk);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    if (i < n) continue;
    if constexpr (Element::kWords == 8) {
      chunk.w[i] = 0;
    } else {
      chunk.w[i / 2] = i % 2 ? chunk.w[i / 2] & 0xFFFFu : 0;
    }
  }
  return chunk;
}

// Tiles of the upper half in the order of their columns.
struct TilePlace {
  int row, col;

  __device__ explicit TilePlace(int64_t index) {
    col = static_cast<int>((sqrtf(8.0f * static_cast<float>(index) + 1.0f) - 1.0f) * 0.5f);
    while (int64_t{col} * (col + 1) / 2 > index) --col;
    while (int64_t{col + 1} * (col + 2) / 2 <= index) ++col;
    row = static_cast<int>(index - int64_t{col} * (col + 1) / 2);
  }
};

// Adds to an element of the upper half and to its mirror image.
__device__ void add_both(float* g, int cols, int row, int col, float sum) {
  if (row > col || col >= cols) return;
  float& upper = g[int64_t{row} * cols + col];
  const float value = add_rn(upper, sum);
  upper = value;
  g[int64_t{col} * cols + row] = value;
}

struct GramScratch {
  uint16_t left[2][kMmaDepth][kMmaRow], right[2][kMmaDepth][kMmaRow];
};

// Into how many parts the tokens are cut, each with its own sums: a small g has few tiles. The
// device is not asked, for the order of summation must not depend on it.
struct GramParts {
  int count, tokens;  // of each
};

constexpr int kBusyTiles = 264;    // two on each of a large device's multiprocessors
constexpr int kLeastTokens = 256;  // of a part

int64_t most_parts(const Matrix& x) {
  const int64_t edge = ceil_div(x.cols, kMmaTile), wanted = kBusyTiles / (edge * (edge + 1) / 2);
  const int64_t most = ceil_div(x.rows, kLeastTokens);
  return wanted < 1 ? 1 : wanted < most ? wanted : most;
}

GramParts parts_of(const Matrix& x) {
  const int64_t tokens = ceil_div(ceil_div(x.rows, most_parts(x)), kMmaDepth) * kMmaDepth;
  return {static_cast<int>(ceil_div(x.rows, tokens)), static_cast<int>(tokens)};
}

// `sums` [part][tile][128][128], or null if there is one part.
template <typename Element>
__global__ void __launch_bounds__(kThreads, 2)
    gram_kernel(Matrix all, TokenMask mask, GramParts parts, float* g, float* sums_of_parts) {
  GramScratch& scratch = shared<GramScratch>();
  const int edge = (all.cols + kMmaTile - 1) / kMmaTile;
  const int64_t tiles = int64_t{edge} * (edge + 1) / 2;
  const int chunk = static_cast<int>(threadIdx.x) % 16 * kChunk;
  const int token = static_cast<int>(threadIdx.x) / 16;  // and 16 after it
  for (int64_t index = blockIdx.x; index < tiles * parts.count; index += gridDim.x) {
    const int part = static_cast<int>(index / tiles), begin = part * parts.tokens;
    Matrix x = all;
    x.rows = min(all.rows, begin + parts.tokens);
    const TilePlace place(index - part * tiles);
    const int row = place.row * kMmaTile, col = place.col * kMmaTile;
    Chunk<Element> left[2], right[2];
    const auto load = [&](int first) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int t = first + token + i * 16;
        const bool there = t < x.rows && counts(mask, t);
        left[i] = load_token<Element>(x, there, t, row + chunk);
        right[i] = load_token<Element>(x, there, t, col + chunk);
      }
    };
    const auto store = [&](int stage) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t *a = left[i].w, *b = right[i].w;
        store_vector(&scratch.left[stage][token + i * 16][chunk], Words4{{a[0], a[1], a[2], a[3]}});
        store_vector(&scratch.right[stage][token + i * 16][chunk],
                     Words4{{b[0], b[1], b[2], b[3]}});
      }
    };
    const WarpTile warp;
    Sums sums[2][8];
    load(begin);
    store(0);
    sync_block();
    for (int first = begin, stage = 0; first < x.rows; first += kMmaDepth, stage ^= 1) {
      const bool more = first + kMmaDepth < x.rows;
      if (more) load(first + kMmaDepth);
#pragma unroll 1  // or what both halves read is held at a time, and registers spill
      for (int k = 0; k < kMmaDepth; k += 16) {
        Left a[2];
#pragma unroll
        for (int m = 0; m < 2; ++m)
          a[m] = left_of_columns(scratch.left[stage], warp.row + m * 16, k);
#pragma unroll
        for (int n = 0; n < 8; n += 2) {
          const RightPair b = right_of_columns(scratch.right[stage], warp.col + n * 8, k);
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            multiply_add<Element>(sums[m][n], a[m], b.first);
            multiply_add<Element>(sums[m][n + 1], a[m], b.second);
          }
        }
      }
      if (more) store(stage ^ 1);
      sync_block();
    }
    if (sums_of_parts == nullptr) {
      warp.each(sums, [&](int r, int c, float sum) { add_both(g, x.cols, row + r, col + c, sum); });
    } else {
      float* const own = sums_of_parts + index * (kMmaTile * kMmaTile);
      warp.each(sums, [&](int r, int c, float sum) { own[r * kMmaTile + c] = sum; });
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    join_parts_kernel(int cols, int parts, const float* sums_of_parts, float* g) {
  constexpr int kSquare = kMmaTile * kMmaTile;
  const int edge = (cols + kMmaTile - 1) / kMmaTile;
  const int64_t values = int64_t{edge} * (edge + 1) / 2 * kSquare;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < values;
       i += int64_t{gridDim.x} * kThreads) {
    float sum = sums_of_parts[i];
    for (int part = 1; part < parts; ++part) sum = add_rn(sum, sums_of_parts[part * values + i]);
    const TilePlace place(i / kSquare);
    const int within = static_cast<int>(i % kSquare);
    add_both(g, cols, place.row * kMmaTile + within / kMmaTile,
             place.col * kMmaTile + within % kMmaTile, sum);
  }
}

constexpr int kFloatThreads = 128;
constexpr int kFloatTile = 64, kFloatDepth = 16;

struct FloatScratch {
  float left[kFloatDepth][kFloatTile], right[kFloatDepth][kFloatTile];
};

__global__ void __launch_bounds__(kFloatThreads)
    gram_float_kernel(Matrix x, TokenMask mask, float* g) {
  FloatScratch& scratch = shared<FloatScratch>();
  const int edge = (x.cols + kFloatTile - 1) / kFloatTile;
  const int64_t tiles = int64_t{edge} * (edge + 1) / 2;
  const int chunk = static_cast<int>(threadIdx.x) % 8 * kChunk;
  const int token = static_cast<int>(threadIdx.x) / 8;
  const int mine = static_cast<int>(threadIdx.x) / 16 * 8;
  const int from = static_cast<int>(threadIdx.x) % 16 * 4;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const TilePlace place(tile);
    const int row = place.row * kFloatTile, col = place.col * kFloatTile;
    float sums[8][4] = {};
    Chunk<Float32> left, right;
    const auto load = [&](int t) {
      const bool there = t < x.rows && counts(mask, t);
      left = load_token<Float32>(x, there, t, row + chunk);
      right = load_token<Float32>(x, there, t, col + chunk);
    };
    load(token);
    for (int first = 0; first < x.rows; first += kFloatDepth) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t *a = left.w + half * 4, *b = right.w + half * 4;
        store_vector(&scratch.left[token][chunk + half * 4], Words4{{a[0], a[1], a[2], a[3]}});
        store_vector(&scratch.right[token][chunk + half * 4], Words4{{b[0], b[1], b[2], b[3]}});
      }
      sync_block();
      if (first + kFloatDepth < x.rows) load(first + kFloatDepth + token);
#pragma unroll
      for (int k = 0; k < kFloatDepth; ++k) {
        const Words4 above = load_vector<Words4>(&scratch.left[k][mine]);
        const Words4 below = load_vector<Words4>(&scratch.left[k][mine + 4]);
        const Words4 b = load_vector<Words4>(&scratch.right[k][from]);
#pragma unroll
        for (int r = 0; r < 8; ++r) {
          const float a = float_of(r < 4 ? above.w[r % 4] : below.w[r % 4]);
#pragma unroll
          for (int c = 0; c < 4; ++c) sums[r][c] = fma_rn(a, float_of(b.w[c]), sums[r][c]);
        }
      }
      sync_block();
    }
#pragma unroll
    for (int r = 0; r < 8; ++r) {
#pragma unroll
      for (int c = 0; c < 4; ++c) add_both(g, x.cols, row + mine + r, col + from + c, sums[r][c]);
    }
  }
}

// --- channels

constexpr int kChannelChunks = 8;  // side by side in a block of threads
constexpr int kChannelRows = kThreads / kChannelChunks;

struct Channel {
  float low = float_of(0x7F800000u), high = float_of(0xFF800000u), sum = 0.0f;

  __device__ void include(const Channel& other) {
    low = min_nan(low, other.low);
    high = max_nan(high, other.high);
    sum = add_rn(sum, other.sum);
  }
};

struct ChannelScratch {
  float low[kChannelRows][kChunk][kChannelChunks];
  float high[kChannelRows][kChunk][kChannelChunks];
  float sum[kChannelRows][kChunk][kChannelChunks];
};

template <typename Element>
__global__ void __launch_bounds__(kThreads)
    channel_kernel(Matrix x, TokenMask mask, float* channels) {
  ChannelScratch& scratch = shared<ChannelScratch>();
  const int across = threadIdx.x % kChannelChunks, down = threadIdx.x / kChannelChunks;
  const int step = static_cast<int>(gridDim.x) * kChannelChunks * kChunk;
  for (int first = static_cast<int>(blockIdx.x) * kChannelChunks * kChunk; first < x.cols;
       first += step) {
    const int col = first + across * kChunk, n = min(x.cols - col, kChunk);
    Channel found[kChunk];
    if (n > 0) {
#pragma unroll 4
      for (int token = down; token < x.rows; token += kChannelRows) {
        if (!counts(mask, token)) continue;
        const Chunk<Element> values = load_chunk<Element>(x, token, col, n);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          const float value = values[i];
          found[i].include(Channel{value, value, float_of(bits_of(value) & 0x7FFFFFFFu)});
        }
      }
    }
    for (int half = kChannelRows; half > 0; half /= 2) {
      if (down < half && half < kChannelRows) {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          found[i].include(Channel{scratch.low[down + half][i][across],
                                   scratch.high[down + half][i][across],
                                   scratch.sum[down + half][i][across]});
        }
      }
      if (down < half) {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          scratch.low[down][i][across] = found[i].low;
          scratch.high[down][i][across] = found[i].high;
          scratch.sum[down][i][across] = found[i].sum;
        }
      }
      sync_block();
    }
    if (down != 0) continue;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (i >= n) break;
      float* const out = channels + col + i;
      Channel all{out[0], out[x.cols], out[int64_t{2} * x.cols]};
      all.include(found[i]);
      const bool nan = all.sum != all.sum;  // all three are, if one is
      out[0] = nan ? all.sum : all.low;
      out[x.cols] = nan ? all.sum : all.high;
      out[int64_t{2} * x.cols] = all.sum;
    }
  }
}

int64_t tiles_of(int cols, int tile) {
  const int64_t edge = ceil_div(cols, tile);
  return edge * (edge + 1) / 2;
}

}  // namespace

int64_t gram_workspace(const Matrix& x) {
  const int64_t parts = x.dtype == DType::kFloat32 ? 1 : most_parts(x);
  return parts == 1 ? 0 : parts * tiles_of(x.cols, kMmaTile) * kMmaTile * kMmaTile;
}

cudaError_t gram(const Matrix& x, const TokenMask& mask, float* g, float* workspace,
                 cudaStream_t stream) {
  if (x.dtype == DType::kFloat32) {
    return launch(gram_float_kernel, dim3(grid_extent(tiles_of(x.cols, kFloatTile))),
                  dim3(kFloatThreads), sizeof(FloatScratch), stream, x, mask, g);
  }
  const GramParts parts = parts_of(x);
  const int64_t tiles = tiles_of(x.cols, kMmaTile);
  float* const sums = parts.count == 1 ? nullptr : workspace;
  const cudaError_t status =
      launch(x.dtype == DType::kBFloat16 ? gram_kernel<BFloat16> : gram_kernel<Float16>,
             dim3(grid_extent(tiles * parts.count)), dim3(kThreads), sizeof(GramScratch), stream, x,
             mask, parts, g, sums);
  if (status != cudaSuccess || sums == nullptr) return status;
  return launch(join_parts_kernel,
                dim3(grid_extent(ceil_div(tiles * kMmaTile * kMmaTile, kThreads))), dim3(kThreads),
                0, stream, x.cols, parts.count, workspace, g);
}

cudaError_t channel_statistics(const Matrix& x, const TokenMask& mask, float* channels,
                               cudaStream_t stream) {
  const dim3 grid(grid_extent(ceil_div(x.cols, kChannelChunks * kChunk)));
  return with_element(x.dtype, [&](auto element) {
    return launch(channel_kernel<decltype(element)>, grid, dim3(kThreads), sizeof(ChannelScratch),
                  stream, x, mask, channels);
  });
}

}  // namespace qk::cuda
