// Order statistics without sorting. Values sort as whole numbers made of their bits, their keys;
// the k-th smallest key, k from 0, is the largest number that no more than k keys lie below, and is
// found from its highest bits on, by counting.
//
// A block of up to kLargestRanked elements is a team's of 1 to 512 threads, as in search.cu: what
// fits is kept in registers, and a bit is settled by one sum over the team. Larger blocks are cut
// into pieces; all pieces count below 15 numbers at a time, which settles four bits a launch.
#include "cuda/common/percentile.h"

#include "cuda/common/quantizer.h"

namespace qk::cuda {
namespace {

constexpr uint32_t kSign = 0x80000000u;
constexpr uint32_t kNone = 0xFFFFFFFFu;  // as a key: below no number

// Bits of a float that are zero in every value of the type.
template <typename Element>
constexpr int kUnused = __is_same(Element, BFloat16)  ? 16
                        : __is_same(Element, Float16) ? 13
                                                      : 0;

// A float and its key: the magnitude's bits, or all bits with negative numbers turned over.
template <typename Element, bool kMagnitudes>
struct Order {
  static constexpr int kHighest = kMagnitudes ? 30 : 31;
  static constexpr int kLowest = kUnused<Element>;

  __device__ static uint32_t key(float value) {
    const uint32_t bits = bits_of(value);
    if (kMagnitudes) return bits & ~kSign;
    return (bits & kSign ? ~bits : bits | kSign) & kNone << kLowest;
  }
  __device__ static float value(uint32_t key) {
    if (kMagnitudes) return float_of(key);
    return float_of(key & kSign ? key ^ kSign : ~key & kNone << kLowest);
  }
};

// Keys of eight values from (row, col) on, kNone for those that are not there.
template <typename Element, typename Keys>
struct KeyChunk {
  uint32_t v[kChunk];

  __device__ bool load(const Matrix& x, const Tile::Position& at) {
    const Chunk<Element> chunk = load_chunk<Element>(x, at.row, at.col, at.n);
    bool finite = true;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      finite = finite && is_finite(chunk[i]);
      v[i] = i < at.n ? Keys::key(chunk[i]) : kNone;
    }
    return finite;
  }
  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) v[i] = kNone;
  }
  __device__ int below(uint32_t number) const {
    int count = 0;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) count += v[i] < number;
    return count;
  }
};

// How many of n values lie below the one that ends the part, counted from an end.
__device__ int64_t rank_of(const PercentileScale& how, int64_t n) {
  const int64_t wanted = static_cast<int64_t>(ceil(static_cast<double>(n) * how.part));
  return (wanted > 1 ? wanted : 1) - 1;
}

__device__ void store(const PercentileScale& how, float low, float high, bool finite, int index,
                      float* scale, int8_t* zero_point) {
  ScaleAndZero found;
  if (!finite) {
    found = {float_of(0x7FC00000u), 0};
  } else if (how.symmetric) {
    found = {symmetric_scale(high, how.divisor, how.scale_dtype), 0};
  } else {
    found = asymmetric_scale(Range{low, high}, how.q_min, how.q_max, how.scale_dtype);
  }
  scale[index] = found.scale;
  if (!how.symmetric) zero_point[index] = static_cast<int8_t>(found.zero_point);
}

struct CountScratch {
  int warps[kMaxTeam / kWarp];
};

// The sum of a team, in all of its threads.
__device__ int combine(int mine, int team, CountScratch& scratch) {
  for (int mask = (team < kWarp ? team : kWarp) / 2; mask > 0; mask /= 2)
    mine += shuffle_xor(mine, mask);
  if (team <= kWarp) return mine;
  if (threadIdx.x % kWarp == 0) scratch.warps[threadIdx.x / kWarp] = mine;
  sync_block();
  int sum = 0;
  for (int i = 0; i < team / kWarp; ++i) sum += scratch.warps[i];
  sync_block();  // scratch may be written again
  return sum;
}

template <typename Element, bool kMagnitudes>
__global__ void __launch_bounds__(kMaxTeam, 1)
    percentile_kernel(Matrix x, Blocks blocks, PercentileScale how, float* scale,
                      int8_t* zero_point, int team) {
  using Keys = Order<Element, kMagnitudes>;
  CountScratch& scratch = shared<CountScratch>();
  const int teams = static_cast<int>(blockDim.x) / team;
  const int mine = static_cast<int>(threadIdx.x) / team;
  const int lane = static_cast<int>(threadIdx.x) - mine * team;
  const int stride = static_cast<int>(gridDim.x) * teams;
  for (int first = static_cast<int>(blockIdx.x) * teams; first < count(blocks); first += stride) {
    const int index = first + mine;
    const Tile tile(x, blocks, index);
    KeyChunk<Element, Keys> kept[kChunksKept], more;
    bool finite = true;
#pragma unroll
    for (int k = 0; k < kChunksKept; ++k) {
      const int chunk = lane + k * team;
      if (chunk < tile.chunks) {
        finite = kept[k].load(x, tile.at(chunk)) && finite;
      } else {
        kept[k].clear();
      }
    }
    for (int chunk = lane + kChunksKept * team; chunk < tile.chunks; chunk += team)
      finite = more.load(x, tile.at(chunk)) && finite;
    finite = combine(finite ? 0 : 1, team, scratch) == 0;

    const auto smallest = [&](int rank) {
      uint32_t found = 0;
      for (int bit = Keys::kHighest; bit >= Keys::kLowest; --bit) {
        const uint32_t tried = found | 1u << bit;
        int below = 0;
#pragma unroll
        for (int k = 0; k < kChunksKept; ++k) below += kept[k].below(tried);
        for (int chunk = lane + kChunksKept * team; chunk < tile.chunks; chunk += team) {
          more.load(x, tile.at(chunk));
          below += more.below(tried);
        }
        if (combine(below, team, scratch) <= rank) found = tried;
      }
      return Keys::value(found);
    };
    const int n = tile.rows * tile.cols, rank = static_cast<int>(rank_of(how, n));
    const float high = smallest(rank);
    const float low = kMagnitudes ? 0.0f : smallest(n - 1 - rank);
    if (lane == 0 && index < count(blocks)) store(how, low, high, finite, index, scale, zero_point);
  }
}

// --- blocks in pieces

constexpr int kDigitBits = 4, kTried = (1 << kDigitBits) - 1;
constexpr int kPieceChunks = 4096;

// What is known of a large block: the upper bits of its keys at the upper and the lower end, and of
// the keys counted so far how many lie below each number tried.
template <int kEnds>
struct Known {
  int64_t below[kEnds][kTried];
  uint32_t found[kEnds];
  int not_finite;
};

__host__ __device__ inline int pieces_of(const Matrix& x, const Blocks& blocks) {
  const int rows = blocks.rows < x.rows ? blocks.rows : x.rows;
  const int cols = blocks.cols < x.cols ? blocks.cols : x.cols;
  const int64_t chunks = int64_t{rows} * ((cols + kChunk - 1) / kChunk);
  return static_cast<int>((chunks + kPieceChunks - 1) / kPieceChunks);
}

template <int kEnds>
__global__ void __launch_bounds__(kWarp) start_kernel(Blocks blocks, Known<kEnds>* known) {
  for (int block = blockIdx.x; block < count(blocks); block += static_cast<int>(gridDim.x)) {
    for (int i = threadIdx.x; i < kEnds * kTried; i += kWarp)
      known[block].below[i / kTried][i % kTried] = 0;
    if (threadIdx.x < kEnds) known[block].found[threadIdx.x] = 0;
    if (threadIdx.x == 0) known[block].not_finite = 0;
  }
}

template <typename Element, int kEnds>
__global__ void __launch_bounds__(kThreads)
    count_kernel(Matrix x, Blocks blocks, int shift, Known<kEnds>* known) {
  const int pieces = pieces_of(x, blocks);
  const int64_t work = int64_t{count(blocks)} * pieces;
  for (int64_t index = blockIdx.x; index < work; index += gridDim.x) {
    const int block = static_cast<int>(index / pieces);
    const int begin = static_cast<int>(index - int64_t{block} * pieces) * kPieceChunks;
    const Tile tile(x, blocks, block);
    const int end = min(tile.chunks, begin + kPieceChunks);
    Known<kEnds>& mine = known[block];
    int below[kEnds][kTried] = {};
    bool finite = true;
    for (int chunk = begin + static_cast<int>(threadIdx.x); chunk < end; chunk += kThreads) {
      KeyChunk<Element, Order<Element, kEnds == 1>> keys;
      finite = keys.load(x, tile.at(chunk)) && finite;
#pragma unroll
      for (int e = 0; e < kEnds; ++e) {
        const uint32_t found = mine.found[e];
#pragma unroll
        for (int i = 0; i < kTried; ++i)
          below[e][i] += keys.below(found | static_cast<uint32_t>(i + 1) << shift);
      }
    }
    if (!finite) atomic_or(&mine.not_finite, 1);
#pragma unroll
    for (int e = 0; e < kEnds; ++e) {
#pragma unroll
      for (int i = 0; i < kTried; ++i) {
        int sum = below[e][i];
        for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
        if (threadIdx.x % kWarp == 0 && sum != 0) atomic_add(&mine.below[e][i], int64_t{sum});
      }
    }
  }
}

template <typename Element, int kEnds>
__global__ void __launch_bounds__(kWarp)
    choose_kernel(Matrix x, Blocks blocks, PercentileScale how, int shift, bool last,
                  Known<kEnds>* known, float* scale, int8_t* zero_point) {
  using Keys = Order<Element, kEnds == 1>;
  for (int block = static_cast<int>(blockIdx.x * kWarp + threadIdx.x); block < count(blocks);
       block += static_cast<int>(gridDim.x) * kWarp) {
    const Tile tile(x, blocks, block);
    const int64_t n = int64_t{tile.rows} * tile.cols, rank = rank_of(how, n);
    Known<kEnds>& mine = known[block];
    for (int e = 0; e < kEnds; ++e) {
      uint32_t digit = 0;
      for (int i = 0; i < kTried; ++i) {
        if (mine.below[e][i] <= (e == 0 ? rank : n - 1 - rank)) ++digit;
        mine.below[e][i] = 0;
      }
      mine.found[e] |= digit << shift;
    }
    if (!last) continue;
    store(how, kEnds == 2 ? Keys::value(mine.found[kEnds - 1]) : 0.0f, Keys::value(mine.found[0]),
          mine.not_finite == 0, block, scale, zero_point);
  }
}

template <typename Element, int kEnds>
cudaError_t in_pieces(const Matrix& x, const Blocks& blocks, const PercentileScale& how,
                      void* workspace, float* scale, int8_t* zero_point, cudaStream_t stream) {
  auto* const known = static_cast<Known<kEnds>*>(workspace);
  const dim3 each(grid_extent(count(blocks)));
  const dim3 pieces(grid_extent(int64_t{count(blocks)} * pieces_of(x, blocks)));
  cudaError_t status = launch(start_kernel<kEnds>, each, dim3(kWarp), 0, stream, blocks, known);
  for (int shift = 32 - kDigitBits; status == cudaSuccess; shift -= kDigitBits) {
    const bool last = shift <= kUnused<Element>;
    status = launch(count_kernel<Element, kEnds>, pieces, dim3(kThreads), 0, stream, x, blocks,
                    shift, known);
    if (status == cudaSuccess)
      status = launch(choose_kernel<Element, kEnds>, each, dim3(kWarp), 0, stream, x, blocks, how,
                      shift, last, known, scale, zero_point);
    if (last) break;
  }
  return status;
}

bool is_large(const Blocks& blocks) { return int64_t{blocks.rows} * blocks.cols > kLargestRanked; }

}  // namespace

int64_t percentile_workspace(const Blocks& blocks, const PercentileScale& how) {
  if (!is_large(blocks)) return 0;
  const size_t each = how.symmetric ? sizeof(Known<1>) : sizeof(Known<2>);
  return int64_t{count(blocks)} * static_cast<int64_t>(each);
}

cudaError_t percentile_scales(const Matrix& x, const Blocks& blocks, const PercentileScale& how,
                              void* workspace, float* scale, int8_t* zero_point,
                              cudaStream_t stream) {
  return with_element(x.dtype, [&](auto element) {
    using Element = decltype(element);
    if (is_large(blocks)) {
      const auto run = how.symmetric ? in_pieces<Element, 1> : in_pieces<Element, 2>;
      return run(x, blocks, how, workspace, scale, zero_point, stream);
    }
    const int team = team_for(int64_t{blocks.rows} * ceil_div(blocks.cols, kChunk));
    const int threads = team > kWarp ? team : kThreads;
    const unsigned grid = grid_extent(ceil_div(count(blocks), threads / team));
    const auto kernel =
        how.symmetric ? percentile_kernel<Element, true> : percentile_kernel<Element, false>;
    return launch(kernel, dim3(grid), dim3(static_cast<unsigned>(threads)), sizeof(CountScratch),
                  stream, x, blocks, how, scale, zero_point, team);
  });
}

}  // namespace qk::cuda
