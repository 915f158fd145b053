// The GPTQ sweep within a stripe of columns. Every product, sum and rounding is that of the CPU
// kernels (csrc/cpu/gptq_impl.h) in the same order, so that the codes are the same bits: errors are
// taken off in the order of their columns, with one rounding each.
//
// stripe_kernel: 32 rows to a block, four threads to a row, of which each holds every fourth run of
// four columns in registers; the stripe's square of u is in shared memory. The thread that owns a
// column rounds it and the other three get its error by a shuffle.
#include "cuda/common/gptq.h"

#include "cuda/common/quantizer.h"

namespace qk::cuda {
namespace {

constexpr int kTeam = 4;  // threads of a row
constexpr int kSweepThreads = 128;
constexpr int kRows = kSweepThreads / kTeam;
constexpr int kRuns = kSweepCols / (4 * kTeam);  // of four columns, in a thread
static_assert(kSweepFit == 4 * kTeam);

// --- scales

__device__ Range combine_team(Range range) {
#pragma unroll
  for (int mask = 1; mask < kTeam; mask *= 2) {
    range.include(Range{shuffle_xor(range.low, mask), shuffle_xor(range.high, mask)});
  }
  return range;
}

__device__ ScaleAndZero scale_of(const Sweep& sweep, Range range, float shrink) {
  if (sweep.symmetric) {
    return {symmetric_scale(mul_rn(range.absmax(), shrink), sweep.divisor, sweep.scale_dtype), 0};
  }
  return asymmetric_scale(Range{mul_rn(range.low, shrink), mul_rn(range.high, shrink)}, sweep.q_min,
                          sweep.q_max, sweep.scale_dtype);
}

// Of a candidate; low and high bound its codes less the zero point.
struct Candidate {
  float scale, inverse, low, high;

  __device__ Candidate(const Sweep& sweep, ScaleAndZero found)
      : scale(found.scale),
        inverse(div_rn(1.0f, found.scale)),
        low(static_cast<float>(sweep.q_min - found.zero_point)),
        high(static_cast<float>(sweep.q_max - found.zero_point)) {}
};

constexpr int kTogether = 3;  // candidates of a thread in one pass over the group

// The best scale of a group of a row, the same in all threads of its team; every thread of a warp
// comes here. Candidates are dealt out to the team; each sums its errors in the order of columns.
__device__ ScaleAndZero fit_group(const Sweep& sweep, const float* values, const float* inverse,
                                  int width, Range range) {
  range = combine_team(range);
  range = Range{min_nan(range.low, 0.0f), max_nan(range.high, 0.0f)};
  ScaleAndZero best = scale_of(sweep, range, 1.0f);
  if (sweep.search_steps == 0) return best;
  const auto shrink_of = [&](int i) {
    return i == 0 ? 1.0f : static_cast<float>(1.0 - sweep.search_range * i / sweep.search_steps);
  };
  float least = float_of(0x7F800000u);
  int least_index = 0;
  for (int i = threadIdx.x % kTeam; i <= sweep.search_steps; i += kTogether * kTeam) {
    float scale[kTogether], step[kTogether], low[kTogether], high[kTogether], sum[kTogether];
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const Candidate candidate(sweep, scale_of(sweep, range, shrink_of(i + j * kTeam)));
      scale[j] = candidate.scale;
      step[j] = candidate.inverse;
      low[j] = candidate.low;
      high[j] = candidate.high;
      sum[j] = 0.0f;
    }
    for (int c = 0; c < width; ++c) {
      const float value = values[c], weight = inverse[c];
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const float steps = fmaxf(low[j], fminf(high[j], mul_rn(value, step[j])));
        const float code = static_cast<float>(round_to_int(steps));
        const float error = mul_rn(sub_rn(mul_rn(code, scale[j]), value), weight);
        sum[j] = add_rn(sum[j], mul_rn(error, error));
      }
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      if (i + j * kTeam <= sweep.search_steps && sum[j] < least) {
        least = sum[j];
        least_index = i + j * kTeam;
      }
    }
  }
#pragma unroll
  for (int mask = 1; mask < kTeam; mask *= 2) {
    const float other = shuffle_xor(least, mask);
    const int index = shuffle_xor(least_index, mask);
    if (other < least || (other == least && index < least_index)) {
      least = other;
      least_index = index;
    }
  }
  return scale_of(sweep, range, shrink_of(least_index));
}

__device__ void store_scale(const Sweep& sweep, int64_t row, int group, ScaleAndZero found) {
  sweep.scale[row * sweep.groups + group] = found.scale;
  if (sweep.zero_point != nullptr)
    sweep.zero_point[row * sweep.groups + group] = static_cast<int8_t>(found.zero_point);
}

__global__ void __launch_bounds__(kSweepThreads)
    fit_kernel(Sweep sweep, int group, int first, int width) {
  const int64_t rows = int64_t{sweep.batch} * sweep.rows, step = int64_t{gridDim.x} * kRows;
  const int lane = threadIdx.x % kTeam;
  for (int64_t tile = int64_t{blockIdx.x} * kRows; tile < rows; tile += step) {
    const int64_t wanted = tile + threadIdx.x / kTeam, row = wanted < rows ? wanted : rows - 1;
    const float* const values = sweep.values + row * sweep.stride + first;
    const float* const inverse = sweep.inverse + row / sweep.rows * sweep.inverse_batch + first;
    Range range;
    for (int c = lane; c < width; c += kTeam) range.include(Range{values[c], values[c]});
    const ScaleAndZero found = fit_group(sweep, values, inverse, width, range);
    if (lane == 0 && wanted < rows) store_scale(sweep, row, group, found);
  }
}

// --- the stripe

struct StripeScratch {
  float u[kSweepCols][kSweepCols];
  float inverse[kSweepCols];
  float values[kRows][kSweepCols + 1];  // of a group, for its search
};

// Scales and zero points of this thread's run of four columns, as they are given.
struct RunScales {
  float scale[4], zero[4];

  __device__ void load(const Sweep& sweep, int64_t row, int col, int n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      scale[e] = 1.0f;
      zero[e] = 0.0f;
      if (e >= n) continue;
      const int group = sweep.g_idx != nullptr ? sweep.g_idx[col + e] : (col + e) / sweep.size;
      if (static_cast<unsigned>(group) >= static_cast<unsigned>(sweep.groups)) continue;
      scale[e] = sweep.scale[row * sweep.groups + group];
      if (sweep.zero_point != nullptr)
        zero[e] = static_cast<float>(sweep.zero_point[row * sweep.groups + group]);
    }
  }
};

template <bool kFit>
__global__ void __launch_bounds__(kSweepThreads) stripe_kernel(Sweep sweep, int first, int width) {
  StripeScratch& scratch = shared<StripeScratch>();
  const int lane = threadIdx.x % kTeam, own_row = threadIdx.x / kTeam;
  const int leader = threadIdx.x % kWarp - lane;
  const float q_min = static_cast<float>(sweep.q_min), q_max = static_cast<float>(sweep.q_max);
  const int row_tiles = (sweep.rows + kRows - 1) / kRows;
  const int64_t tiles = int64_t{sweep.batch} * row_tiles;
  int64_t loaded = -1;  // the matrix that scratch.u is of
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t b = tile / row_tiles, factor = sweep.u_batch == 0 ? 0 : b;
    if (factor != loaded) {
      sync_block();
      const float* const u = sweep.u + b * sweep.u_batch + first * (sweep.u_stride + 1);
      for (int i = threadIdx.x; i < kSweepCols * kSweepCols / 4; i += kSweepThreads) {
        const int c = i / (kSweepCols / 4), at = i % (kSweepCols / 4) * 4;
        store_vector(&scratch.u[c][at],
                     load_four(u + c * sweep.u_stride + at, c < width ? width - at : 0));
      }
      const float* const inverse = sweep.inverse + b * sweep.inverse_batch + first;
      scratch.inverse[threadIdx.x] =
          static_cast<int>(threadIdx.x) < width ? inverse[threadIdx.x] : 0.0f;
      sync_block();
      loaded = factor;
    }
    const int row = static_cast<int>(tile - b * row_tiles) * kRows + own_row;
    const bool exists = row < sweep.rows;
    const int64_t at_row = b * sweep.rows + (exists ? row : sweep.rows - 1);
    float* const values = sweep.values + at_row * sweep.stride + first;

    float w[kRuns][4];
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      const int col = (i * kTeam + lane) * 4;
      const Words4 four = load_four(values + col, width - col);
#pragma unroll
      for (int e = 0; e < 4; ++e) w[i][e] = float_of(four.w[e]);
    }
    float loss = sweep.loss[at_row];
    RunScales scales, next;
    if constexpr (!kFit) next.load(sweep, at_row, first + lane * 4, width - lane * 4);

#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      const int start = i * kTeam * 4;  // of the four runs
      if (start >= width) break;
      const int col = start + lane * 4;
      if constexpr (kFit) {
        if (start % sweep.size == 0) {
          const int count = min(sweep.size, width - start);
          Range range;
          sync_warp();  // the values of the group before have been read
#pragma unroll
          for (int j = i; j < kRuns; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const int c = (j * kTeam + lane) * 4 + e;
              if (c >= start + count) continue;
              scratch.values[own_row][c] = w[j][e];
              range.include(Range{w[j][e], w[j][e]});
            }
          }
          sync_warp();
          const ScaleAndZero found = fit_group(sweep, &scratch.values[own_row][start],
                                               &scratch.inverse[start], count, range);
          if (lane == 0 && exists) store_scale(sweep, at_row, (first + start) / sweep.size, found);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            scales.scale[e] = found.scale;
            scales.zero[e] = static_cast<float>(found.zero_point);
          }
        }
      } else {
        scales = next;
        const int ahead = col + kTeam * 4;
        next.load(sweep, at_row, first + ahead, width - ahead);
      }
      uint32_t codes = 0;
#pragma unroll 1
      for (int owner = 0; owner < kTeam; ++owner) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int c = start + owner * 4 + e;
          // Every thread rounds its own column, the owner's counts.
          const float steps = mul_rn(w[i][e], div_rn(1.0f, scales.scale[e]));
          const int code = round_to_int(
              fmaxf(sub_rn(q_min, scales.zero[e]), fminf(sub_rn(q_max, scales.zero[e]), steps)));
          const float rounded = mul_rn(static_cast<float>(code), scales.scale[e]);
          const float own = mul_rn(sub_rn(rounded, w[i][e]), scratch.inverse[c]);
          const float minus = shuffle_from(own, leader + owner);
          loss = add_rn(loss, mul_rn(mul_rn(0.5f, minus), minus));
          const float* const u = scratch.u[c];
          if (lane == owner) {
            const int whole = code + static_cast<int>(scales.zero[e]);
            codes |= (static_cast<uint32_t>(whole) & 0xFFu) << (e * 8);
            w[i][e] = minus;
          }
          const Words4 near = load_vector<Words4>(u + col);
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            if (lane > owner || (lane == owner && k > e))
              w[i][k] = fma_rn(minus, float_of(near.w[k]), w[i][k]);
          }
#pragma unroll
          for (int j = i + 1; j < kRuns; ++j) {
            const Words4 factors = load_vector<Words4>(u + (j * kTeam + lane) * 4);
#pragma unroll
            for (int k = 0; k < 4; ++k) w[j][k] = fma_rn(minus, float_of(factors.w[k]), w[j][k]);
          }
        }
      }
      if (exists) {
        int8_t* const out = sweep.codes + at_row * sweep.cols + first + col;
        if (width - col >= 4 && aligned_to(out, 4)) {
          store_vector(out, codes);
        } else {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            if (e < width - col) out[e] = static_cast<int8_t>(codes >> (e * 8));
          }
        }
        store_four(values + col, w[i], width - col);
      }
    }
    if (exists && lane == 0) {
      sweep.loss[at_row] = loss;
      if (!is_finite(loss)) atomic_or(sweep.status, kSweepBadLoss);
    }
  }
}

}  // namespace

cudaError_t sweep_fit(const Sweep& sweep, int group, int first, int width, cudaStream_t stream) {
  const int64_t tiles = ceil_div(int64_t{sweep.batch} * sweep.rows, kRows);
  return launch(fit_kernel, dim3(grid_extent(tiles)), dim3(kSweepThreads), 0, stream, sweep, group,
                first, width);
}

cudaError_t sweep_stripe(const Sweep& sweep, int first, int width, bool fit, cudaStream_t stream) {
  const dim3 grid(grid_extent(sweep.batch * ceil_div(sweep.rows, kRows)));
  return launch(fit ? stripe_kernel<true> : stripe_kernel<false>, grid, dim3(kSweepThreads),
                sizeof(StripeScratch), stream, sweep, first, width);
}

}  // namespace qk::cuda
