// Fused round-to-nearest: a weight or activation is read from memory once.
//
// A team of 1 to 512 threads takes one block (a group, a channel, a token, [r, c]): it loads up to
// four chunks a thread into registers and reduces them, every thread computes the scale for itself,
// and the codes are made from the registers. What did not fit, only blocks over 16384 elements, is
// read a second time, from L2.
#include "cuda/common/rtn.h"

#include "cuda/common/quantizer.h"

namespace qk::cuda {
namespace {

template <typename Element>
__global__ void __launch_bounds__(kMaxTeam)
    rtn_kernel(Matrix x, Blocks blocks, RtnArgs args, CodeOutput out, float* scale,
               int8_t* zero_point, int team) {
  TeamScratch& scratch = shared<TeamScratch>();
  const int teams = static_cast<int>(blockDim.x) / team;
  const int mine = static_cast<int>(threadIdx.x) / team;
  const int lane = static_cast<int>(threadIdx.x) - mine * team;
  const int step = static_cast<int>(gridDim.x) * teams;
  for (int first = static_cast<int>(blockIdx.x) * teams; first < count(blocks); first += step) {
    const int index = first + mine;
    const Tile tile(x, blocks, index);
    const auto load = [&](int chunk) {
      const auto at = tile.at(chunk);
      return load_chunk<Element>(x, at.row, at.col, at.n);
    };
    Chunk<Element> kept[kChunksKept];
#pragma unroll
    for (int k = 0; k < kChunksKept; ++k) {
      if (lane + k * team < tile.chunks) kept[k] = load(lane + k * team);
    }
    Range range;
#pragma unroll
    for (int k = 0; k < kChunksKept; ++k) {
      if (lane + k * team < tile.chunks) range.include(kept[k]);
    }
    for (int chunk = lane + kChunksKept * team; chunk < tile.chunks; chunk += team)
      range.include(load(chunk));
    range = combine(range, team, scratch).finished();

    ScaleAndZero found{0.0f, 0};
    if (args.symmetric) {
      found.scale = symmetric_scale(range.absmax(), args.divisor, args.scale_dtype);
    } else {
      found = asymmetric_scale(range, args.q_min, args.q_max, args.scale_dtype);
    }
    if (lane == 0 && index < count(blocks)) {
      scale[index] = found.scale;
      if (!args.symmetric) zero_point[index] = static_cast<int8_t>(found.zero_point);
    }
    const Quantizer quantize(args.code, found.scale, found.zero_point, args.q_min, args.q_max);
    const auto store = [&](int chunk, const Chunk<Element>& values) {
      const auto at = tile.at(chunk);
      out.store(at.row, at.col, quantize(values), at.n);
    };
#pragma unroll
    for (int k = 0; k < kChunksKept; ++k) {
      if (lane + k * team < tile.chunks) store(lane + k * team, kept[k]);
    }
    for (int chunk = lane + kChunksKept * team; chunk < tile.chunks; chunk += team)
      store(chunk, load(chunk));
  }
}

// Beyond this a block leaves most of the device idle, or is read back from memory rather than L2.
constexpr int64_t kLargestBlock = 262144;

}  // namespace

bool rtn_fits(const Blocks& blocks) {
  const bool starts_at_chunk = blocks.cols % kChunk == 0 || blocks.grid_cols == 1;
  return starts_at_chunk && int64_t{blocks.rows} * blocks.cols <= kLargestBlock;
}

cudaError_t rtn(const Matrix& x, const Blocks& blocks, const RtnArgs& args, void* out, float* scale,
                int8_t* zero_point, cudaStream_t stream) {
  if (count(blocks) == 0) return cudaSuccess;
  return with_element(x.dtype, [&](auto element) {
    const int team = team_for(int64_t{blocks.rows} * ceil_div(blocks.cols, kChunk));
    const int threads = team > kWarp ? team : kThreads;
    const unsigned grid = grid_extent(ceil_div(count(blocks), threads / team));
    return launch(rtn_kernel<decltype(element)>, dim3(grid), dim3(static_cast<unsigned>(threads)),
                  sizeof(TeamScratch), stream, x, blocks, args,
                  code_output(out, x.cols, args.pack_bits), scale, zero_point, team);
  });
}

}  // namespace qk::cuda
