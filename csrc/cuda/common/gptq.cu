// The GPTQ sweep within a stripe of columns. Every product, sum and rounding is that of the CPU
// kernels (csrc/cpu/gptq_impl.h) in the same order, so that the codes are the same bits (but for
// wide matrices where the CPU sums bf16 numbers): errors are taken off in the order of their
// columns, with one rounding each.
//
// stripe_kernel: 32 rows to a block, four threads to a row, of which each holds every fourth run of
// four columns in registers; the stripe's square of shares is in shared memory. The thread that
// owns a column rounds it and the other three get by how much it fell by a shuffle.
#include "cuda/common/gptq.h"

#include "cuda/common/quantizer.h"

namespace qk::cuda {
namespace {

constexpr int kTeam = 4;  // threads of a row
constexpr int kSweepThreads = 128;
constexpr int kRows = kSweepThreads / kTeam;
constexpr int kRuns = kSweepCols / (4 * kTeam);  // of four columns, in a thread

struct StripeScratch {
  float share[kSweepCols][kSweepCols];
  float diagonal[kSweepCols];
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

// The value of e2m1 that is nearest to x, as the CPU rounds: the sum's unit in the last place is
// the value's.
__device__ float nearest_float4(float x) {
  const uint32_t sign = bits_of(x) & 0x80000000u;
  const float size = fminf(6.0f, float_of(bits_of(x) ^ sign));
  const float least = fmaxf(1.0f, float_of(bits_of(size) & 0x7F800000u));  // a power of two
  const float magic = mul_rn(least, 4194304.0f);
  return float_of(bits_of(sub_rn(add_rn(size, magic), magic)) | sign);
}

// Columns' codes (the byte) and what they stand for in steps of the scale.
template <int kFloatBits>
__device__ uint32_t round_column(float scaled, float low, float high, float zero, float* value) {
  if constexpr (kFloatBits == 0) {
    const int code = round_to_int(fmaxf(low, fminf(high, scaled)));
    *value = static_cast<float>(code);
    return static_cast<uint32_t>(code + static_cast<int>(zero)) & 0xFFu;
  }
  const float near = kFloatBits == 4 ? nearest_float4(scaled) : scaled;
  const uint32_t code = narrow_float8_e4m3x2(near, 0.0f) & 0xFFu;
  *value = float8_e4m3_value(code);
  return code;
}

template <int kFloatBits>
__global__ void __launch_bounds__(kSweepThreads) stripe_kernel(Sweep sweep, int first, int width) {
  StripeScratch& scratch = shared<StripeScratch>();
  const int lane = threadIdx.x % kTeam, own_row = threadIdx.x / kTeam;
  const int leader = threadIdx.x % kWarp - lane;
  const float q_min = static_cast<float>(sweep.q_min), q_max = static_cast<float>(sweep.q_max);
  const int row_tiles = (sweep.rows + kRows - 1) / kRows;
  const int64_t tiles = int64_t{sweep.batch} * row_tiles;
  int64_t loaded = -1;  // the matrix that scratch.share is of
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t b = tile / row_tiles, factor = sweep.factor_of(b);
    if (factor != loaded) {
      sync_block();
      const float* const share =
          sweep.share + (factor * sweep.cols + first) * sweep.share_stride + first - sweep.origin;
      for (int i = threadIdx.x; i < kSweepCols * kSweepCols / 4; i += kSweepThreads) {
        const int c = i / (kSweepCols / 4), at = i % (kSweepCols / 4) * 4;
        store_vector(&scratch.share[c][at],
                     load_four(share + c * sweep.share_stride + at, c < width ? width - at : 0));
      }
      const float* const diagonal = sweep.diagonal + factor * sweep.cols + first;
      scratch.diagonal[threadIdx.x] =
          static_cast<int>(threadIdx.x) < width ? diagonal[threadIdx.x] : 0.0f;
      sync_block();
      loaded = factor;
    }
    const int row = static_cast<int>(tile - b * row_tiles) * kRows + own_row;
    const bool exists = row < sweep.rows;
    const int64_t at_row = b * sweep.rows + (exists ? row : sweep.rows - 1);
    float* const values = sweep.values + at_row * sweep.stride + first;
    const float* const before =
        sweep.w + b * sweep.w_batch + (at_row - b * sweep.rows) * sweep.w_stride + first;

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
    next.load(sweep, at_row, first + lane * 4, width - lane * 4);
    Words4 were, next_were = load_four(before + lane * 4, width - lane * 4);

#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      const int start = i * kTeam * 4;  // of the four runs
      if (start >= width) break;
      const int col = start + lane * 4;
      scales = next;
      were = next_were;
      const int ahead = col + kTeam * 4;
      next.load(sweep, at_row, first + ahead, width - ahead);
      next_were = load_four(before + ahead, width - ahead);
      float inverse[4], low[4], high[4];  // of the codes less the zero point
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        inverse[e] = div_rn(1.0f, scales.scale[e]);
        low[e] = sub_rn(q_min, scales.zero[e]);
        high[e] = sub_rn(q_max, scales.zero[e]);
      }
      uint32_t codes = 0;
#pragma unroll 1
      for (int owner = 0; owner < kTeam; ++owner) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int c = start + owner * 4 + e;
          // Every thread rounds its own column, the owner's counts.
          float value;
          const uint32_t code = round_column<kFloatBits>(mul_rn(w[i][e], inverse[e]), low[e],
                                                         high[e], scales.zero[e], &value);
          const float rounded = mul_rn(value, scales.scale[e]);
          const float own_fell = sub_rn(float_of(were.w[e]), rounded);
          const float own_error = mul_rn(sub_rn(rounded, w[i][e]), scratch.diagonal[c]);
          const float fell = shuffle_from(own_fell, leader + owner);
          const float error = shuffle_from(own_error, leader + owner);
          loss = add_rn(loss, mul_rn(mul_rn(0.5f, error), error));
          const float* const share = scratch.share[c];
          if (lane == owner) {
            codes |= code << (e * 8);
            w[i][e] = fell;
          }
          const Words4 near = load_vector<Words4>(share + col);
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            if (lane > owner || (lane == owner && k > e))
              w[i][k] = fma_rn(fell, float_of(near.w[k]), w[i][k]);
          }
#pragma unroll
          for (int j = i + 1; j < kRuns; ++j) {
            const Words4 factors = load_vector<Words4>(share + (j * kTeam + lane) * 4);
#pragma unroll
            for (int k = 0; k < 4; ++k) w[j][k] = fma_rn(fell, float_of(factors.w[k]), w[j][k]);
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

cudaError_t sweep_stripe(const Sweep& sweep, int first, int width, cudaStream_t stream) {
  const dim3 grid(grid_extent(sweep.batch * ceil_div(sweep.rows, kRows)));
  const auto kernel = sweep.float_bits == 0   ? stripe_kernel<0>
                      : sweep.float_bits == 4 ? stripe_kernel<4>
                                              : stripe_kernel<8>;
  return launch(kernel, grid, dim3(kSweepThreads), sizeof(StripeScratch), stream, sweep, first,
                width);
}

}  // namespace qk::cuda
