// Scales of the least error. A team of 1 to 512 threads takes one block, as rtn.cu does: what fits
// is kept in registers while the candidates go by, four at a time; the rest of a large block is
// read again for each four. All threads of a team have every candidate's error, so that each finds
// the best for itself.
//
// Elements are scaled by a power of two that brings the block's largest one to 1 .. 2: that changes
// no code, and no power of an error overflows or vanishes. Errors are fp32 and summed in fp64.
#include "cuda/common/search.h"

#include "cuda/common/quantizer.h"

namespace qk::cuda {
namespace {

constexpr int kTogether = 4;  // candidates in one pass

struct SearchScratch {
  TeamScratch ranges;
  double sums[kMaxTeam / kWarp][kTogether];
};

struct Errors {
  double v[kTogether];
};

// The sums of a team, in all of its threads, in an order that its size alone decides.
__device__ Errors combine(Errors mine, int team, SearchScratch& scratch) {
  for (int mask = (team < kWarp ? team : kWarp) / 2; mask > 0; mask /= 2) {
#pragma unroll
    for (int j = 0; j < kTogether; ++j) mine.v[j] += shuffle_xor(mine.v[j], mask);
  }
  if (team <= kWarp) return mine;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
#pragma unroll
  for (int j = 0; j < kTogether; ++j) {
    if (threadIdx.x % kWarp == 0) scratch.sums[warp][j] = mine.v[j];
  }
  sync_block();
#pragma unroll
  for (int j = 0; j < kTogether; ++j) {
    mine.v[j] = 0.0;
    for (int i = 0; i < team / kWarp; ++i) mine.v[j] += scratch.sums[i][j];
  }
  sync_block();  // scratch may be written again
  return mine;
}

struct Candidate {
  float step, inverse, low, high;  // low, high: the codes less the zero point
};

// 2^k, for which most * 2^k is 1 .. 2.
__device__ float unit_of(float most) {
  const int exponent = static_cast<int>(bits_of(most) >> 23);
  const int unit = exponent == 0 ? 126 : 127 - exponent;
  return float_of(static_cast<uint32_t>((unit > 126    ? 126
                                         : unit < -126 ? -126
                                                       : unit) +
                                        127)
                  << 23);
}

template <typename Element>
__global__ void __launch_bounds__(kMaxTeam)
    search_kernel(Matrix x, Blocks blocks, ScaleSearch how, float* scale, int8_t* zero_point,
                  int* status, int team) {
  SearchScratch& scratch = shared<SearchScratch>();
  const int teams = static_cast<int>(blockDim.x) / team;
  const int mine = static_cast<int>(threadIdx.x) / team;
  const int lane = static_cast<int>(threadIdx.x) - mine * team;
  const int stride = static_cast<int>(gridDim.x) * teams;
  const float q_min = static_cast<float>(how.q_min), q_max = static_cast<float>(how.q_max);
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
    const float absmax = range.absmax();
    if (!(absmax < float_of(0x7F800000u))) atomic_or(status, kBadValue);
    range = Range{min_nan(range.low, 0.0f), max_nan(range.high, 0.0f)};

    const int ratios = how.steps + 1, tried = how.signs ? 2 * ratios : ratios;
    const auto scale_of = [&](int place) {
      const int i = place < ratios ? place : place - ratios;
      const float part =
          i == 0 ? 1.0f : static_cast<float>(1.0 - how.range * static_cast<double>(i) / how.steps);
      if (how.symmetric) {
        const float size = symmetric_scale(mul_rn(absmax, part), how.divisor, how.scale_dtype);
        return ScaleAndZero{place < ratios ? size : -size, 0};
      }
      return asymmetric_scale(Range{mul_rn(range.low, part), mul_rn(range.high, part)}, how.q_min,
                              how.q_max, how.scale_dtype);
    };
    const float unit = unit_of(absmax);
    int best = 0;
    double least = static_cast<double>(float_of(0x7F800000u));
    for (int candidate = 0; candidate < tried && tried > 1; candidate += kTogether) {
      Candidate candidates[kTogether];
      Errors errors;
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const ScaleAndZero found = scale_of(min(candidate + j, tried - 1));
        const float step = mul_rn(found.scale, unit), zero = static_cast<float>(found.zero_point);
        candidates[j] = {step, div_rn(1.0f, step), sub_rn(q_min, zero), sub_rn(q_max, zero)};
        errors.v[j] = 0.0;
      }
      const auto include = [&](int chunk, const Chunk<Element>& values) {
        const auto at = tile.at(chunk);
        float sums[kTogether] = {};
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          if (i >= at.n) break;
          const float value = mul_rn(values[i], unit);
#pragma unroll
          for (int j = 0; j < kTogether; ++j) {
            const Candidate& c = candidates[j];
            const float code = static_cast<float>(
                round_to_int(fmaxf(c.low, fminf(c.high, mul_rn(value, c.inverse)))));
            const float off = fma_rn(code, c.step, -value);
            const float error = how.norm == 2.0f
                                    ? mul_rn(off, off)
                                    : powf(float_of(bits_of(off) & 0x7FFFFFFFu), how.norm);
            if (how.importance == nullptr) {
              sums[j] = add_rn(sums[j], error);
            } else {
              errors.v[j] +=
                  static_cast<double>(error) * static_cast<double>(how.importance[at.col + i]);
            }
          }
        }
#pragma unroll
        for (int j = 0; j < kTogether; ++j) errors.v[j] += static_cast<double>(sums[j]);
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
        if (candidate + j < tried && errors.v[j] < least) {
          least = errors.v[j];
          best = candidate + j;
        }
      }
    }
    if (lane == 0 && index < count(blocks)) {
      const ScaleAndZero found = scale_of(best);
      scale[index] = found.scale;
      if (!how.symmetric) zero_point[index] = static_cast<int8_t>(found.zero_point);
    }
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

cudaError_t search_scales(const Matrix& x, const Blocks& blocks, const ScaleSearch& how,
                          float* scale, int8_t* zero_point, int* status, cudaStream_t stream) {
  if (how.importance != nullptr) {
    const cudaError_t checked =
        launch(check_importance_kernel, dim3(grid_extent(ceil_div(x.cols, kThreads))),
               dim3(kThreads), 0, stream, how.importance, x.cols, status);
    if (checked != cudaSuccess) return checked;
  }
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
