// Scales of the least error. A team of 1 to 512 threads takes one block, as rtn.cu does: what fits
// is kept in registers while the candidates go by, four at a time; the rest of a large block is
// read again for each four. All threads of a team have every candidate's error, so that each finds
// the best for itself.
#include "cuda/common/search_block.h"

namespace qk::cuda {
namespace {

template <typename Element>
__global__ void __launch_bounds__(kMaxTeam)
    search_kernel(Matrix x, Blocks blocks, ScaleSearch how, float* scale, int8_t* zero_point,
                  int* status, int team) {
  SearchScratch& scratch = shared<SearchScratch>();
  const int teams = static_cast<int>(blockDim.x) / team;
  const int mine = static_cast<int>(threadIdx.x) / team;
  const int lane = static_cast<int>(threadIdx.x) - mine * team;
  const int stride = static_cast<int>(gridDim.x) * teams;
  const int all = tried(how);
  for (int first = static_cast<int>(blockIdx.x) * teams; first < count(blocks); first += stride) {
    const int index = first + mine;
    const Tile tile(x, blocks, index);
    const auto load = [&](int chunk) {
      const auto at = tile.at(chunk);
      return load_chunk<Element>(x, at.row, at.col, at.n);
    };
    Chunk<Element> kept[kChunksKept];
    Range range;
#pragma unroll
    for (int k = 0; k < kChunksKept; ++k) {
      if (lane + k * team >= tile.chunks) continue;
      kept[k] = load(lane + k * team);
      range.include(kept[k]);
    }
    for (int chunk = lane + kChunksKept * team; chunk < tile.chunks; chunk += team)
      range.include(load(chunk));
    range = cuda::combine(range, team, scratch.ranges).finished();
    const BlockSearch search(range);
    if (!search.finite()) atomic_or(status, kBadValue);
    int best = 0;
    double least = static_cast<double>(float_of(0x7F800000u));
    for (int candidate = 0; candidate < all && all > 1; candidate += kTogether) {
      Candidate candidates[kTogether];
      search.prepare(how, candidate, candidates);
      Errors errors{};
      const auto include = [&](int chunk, const Chunk<Element>& values) {
        const auto at = tile.at(chunk);
        search.include(how, candidates, values, at.col, at.n, errors);
      };
#pragma unroll
      for (int k = 0; k < kChunksKept; ++k) {
        if (lane + k * team < tile.chunks) include(lane + k * team, kept[k]);
      }
      for (int chunk = lane + kChunksKept * team; chunk < tile.chunks; chunk += team)
        include(chunk, load(chunk));
      errors = combine(errors, team, scratch);
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        if (candidate + j < all && errors.v[j] < least) {
          least = errors.v[j];
          best = candidate + j;
        }
      }
    }
    if (lane == 0 && index < count(blocks)) {
      const ScaleAndZero found = search.scale_of(how, best);
      scale[index] = found.scale;
      if (!how.symmetric) zero_point[index] = static_cast<int8_t>(found.zero_point);
    }
  }
}

}  // namespace

cudaError_t search_scales(const Matrix& x, const Blocks& blocks, const ScaleSearch& how,
                          float* scale, int8_t* zero_point, int* status, cudaStream_t stream) {
  return with_element(x.dtype, [&](auto element) {
    const int team = team_for(int64_t{blocks.rows} * ceil_div(blocks.cols, kChunk));
    const int threads = team > kWarp ? team : kThreads;
    const unsigned grid = grid_extent(ceil_div(count(blocks), threads / team));
    return launch(search_kernel<decltype(element)>, dim3(grid),
                  dim3(static_cast<unsigned>(threads)), sizeof(SearchScratch), stream, x, blocks,
                  how, scale, zero_point, status, team);
  });
}

}  // namespace qk::cuda
