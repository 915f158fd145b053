// Scales of the GPTQ sweep. Eight threads share the candidates of a row; each has its own copy of
// what it works on, in global memory, so that none waits for another: a group's weights settled as
// if none were rounded, and then, for each candidate, by how much they fall in a sweep of the
// group. Sums have the order of the CPU kernels (csrc/cpu/gptq_impl.h), eight columns of them in
// registers at a time.
#include "cuda/common/gptq.h"

#include "cuda/common/quantizer.h"

namespace qk::cuda {
namespace {

constexpr int kFitThreads = 128;
constexpr int kFitTeam = 8;  // threads of a row
constexpr int kFitRows = kFitThreads / kFitTeam;
constexpr int kFitBlocks = 264;
constexpr int kTileCols = 8;

__device__ ScaleAndZero candidate_scale(const Sweep& sweep, const Range& range, int i) {
  const bool negative = i > sweep.search_steps;
  if (negative) i -= sweep.search_steps + 1;
  const float shrink = i == 0
                           ? 1.0f
                           : static_cast<float>(1.0 - sweep.search_range * static_cast<double>(i) /
                                                          sweep.search_steps);
  if (sweep.symmetric) {
    const float scale =
        symmetric_scale(mul_rn(range.absmax(), shrink), sweep.divisor, sweep.scale_dtype);
    return {negative ? -scale : scale, 0};
  }
  return asymmetric_scale(Range{mul_rn(range.low, shrink), mul_rn(range.high, shrink)}, sweep.q_min,
                          sweep.q_max, sweep.scale_dtype);
}

struct Trial {
  float scale, inverse, low, high;  // low, high: of the codes less the zero point

  __device__ Trial(const Sweep& sweep, ScaleAndZero found)
      : scale(found.scale),
        inverse(div_rn(1.0f, found.scale)),
        low(static_cast<float>(sweep.q_min - found.zero_point)),
        high(static_cast<float>(sweep.q_max - found.zero_point)) {}

  __device__ float rounded(float w) const {
    const int code = round_to_int(fmaxf(low, fminf(high, mul_rn(w, inverse))));
    return mul_rn(static_cast<float>(code), scale);
  }
};

// One thread's view of a group of a row.
struct Group {
  const float* share;  // of the group's first row and column
  int64_t share_stride;
  const float* diagonal;
  int width;
  float* fell;     // this thread's, kFitThreads apart
  float* settled;  // likewise

  // Calls `finish(column, value, so far)` for each column in turn, with `start(column)` made up for
  // the columns before it; what it gives back is by how much the column fell.
  template <typename Start, typename Finish>
  __device__ void in_turn(Start start, Finish finish) const {
    for (int c = 0; c < width; c += kTileCols) {
      float value[kTileCols];
#pragma unroll
      for (int e = 0; e < kTileCols; ++e) value[e] = c + e < width ? start(c + e) : 0.0f;
      const float* row = share + c;
      for (int k = 0; k < c; ++k, row += share_stride) {
        const float by = fell[int64_t{k} * kFitThreads];
#pragma unroll
        for (int e = 0; e < kTileCols; ++e) value[e] = fma_rn(by, row[e], value[e]);
      }
#pragma unroll
      for (int j = 0; j < kTileCols; ++j, row += share_stride) {
        if (c + j >= width) break;
        const float by = finish(c + j, value[j]);
        fell[int64_t{c + j} * kFitThreads] = by;
#pragma unroll
        for (int e = j + 1; e < kTileCols; ++e) value[e] = fma_rn(by, row[e], value[e]);
      }
    }
  }
};

template <bool kInTurn>
__global__ void __launch_bounds__(kFitThreads)
    fit_kernel(Sweep sweep, int group, int first, int width, float* workspace) {
  const int64_t rows = int64_t{sweep.batch} * sweep.rows;
  const int lane = threadIdx.x % kFitTeam;
  float* const own = workspace + int64_t{blockIdx.x} * 2 * width * kFitThreads + threadIdx.x;
  for (int64_t tile = int64_t{blockIdx.x} * kFitRows; tile < rows;
       tile += int64_t{gridDim.x} * kFitRows) {
    const int64_t wanted = tile + threadIdx.x / kFitTeam, row = wanted < rows ? wanted : rows - 1;
    const int64_t b = row / sweep.rows, factor = sweep.factor_of(b);
    const float* const values = sweep.values + row * sweep.stride + first;
    const Group at{
        kInTurn ? sweep.share + (factor * sweep.cols + first) * sweep.share_stride : nullptr,
        sweep.share_stride,
        sweep.diagonal + factor * sweep.cols + first,
        width,
        own,
        own + int64_t{width} * kFitThreads};
    if constexpr (kInTurn) {
      const float* const w =
          sweep.w + b * sweep.w_batch + (row - b * sweep.rows) * sweep.w_stride + first;
      at.in_turn([&](int c) { return sub_rn(values[c], w[c]); },
                 [&](int c, float moved) {
                   at.settled[int64_t{c} * kFitThreads] = sub_rn(w[c], -moved);
                   return -moved;
                 });
    }
    const auto weight = [&](int c) {
      return kInTurn ? at.settled[int64_t{c} * kFitThreads] : values[c];
    };
    Range range{0.0f, 0.0f};
    for (int c = 0; c < width; ++c) {
      const float value = weight(c);
      range.include(Range{value, value});
    }
    const int all = (sweep.search_steps + 1) * (sweep.signs ? 2 : 1);
    float least = float_of(0x7F800000u);
    int best = 0;
    for (int i = lane; i < all && all > 1; i += kFitTeam) {
      const Trial trial(sweep, candidate_scale(sweep, range, i));
      float sum = 0.0f;
      const auto cost = [&](int c, float rounded, float value) {
        const float error = mul_rn(sub_rn(rounded, value), at.diagonal[c]);
        sum = add_rn(sum, mul_rn(error, error));
      };
      if constexpr (kInTurn) {
        at.in_turn(weight, [&](int c, float value) {
          const float rounded = trial.rounded(value);
          cost(c, rounded, value);
          return sub_rn(weight(c), rounded);
        });
      } else {
        for (int c = 0; c < width; ++c) cost(c, trial.rounded(values[c]), values[c]);
      }
      if (sum < least) {
        least = sum;
        best = i;
      }
    }
#pragma unroll
    for (int mask = 1; mask < kFitTeam; mask *= 2) {
      const float other = shuffle_xor(least, mask);
      const int index = shuffle_xor(best, mask);
      if (other < least || (other == least && index < best)) {
        least = other;
        best = index;
      }
    }
    if (lane != 0 || wanted >= rows) continue;
    const ScaleAndZero found = candidate_scale(sweep, range, best);
    sweep.scale[row * sweep.groups + group] = found.scale;
    if (sweep.zero_point != nullptr)
      sweep.zero_point[row * sweep.groups + group] = static_cast<int8_t>(found.zero_point);
  }
}

unsigned fit_grid(const Sweep& sweep) {
  const int64_t tiles = ceil_div(int64_t{sweep.batch} * sweep.rows, kFitRows);
  return grid_extent(tiles < kFitBlocks ? tiles : kFitBlocks);
}

}  // namespace

int64_t sweep_fit_workspace(const Sweep& sweep, int width) {
  return int64_t{fit_grid(sweep)} * 2 * width * kFitThreads;
}

cudaError_t sweep_fit(const Sweep& sweep, int group, int first, int width, bool in_turn,
                      float* workspace, cudaStream_t stream) {
  return launch(in_turn ? fit_kernel<true> : fit_kernel<false>, dim3(fit_grid(sweep)),
                dim3(kFitThreads), 0, stream, sweep, group, first, width, workspace);
}

}  // namespace qk::cuda
