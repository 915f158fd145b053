// One block's search for the scale that errs least, as search.cu and search_large.cu share it.
//
// Elements are scaled by a power of two that brings the block's largest one to 1 .. 2: that changes
// no code, and no power of an error overflows or vanishes. Errors are fp32 and summed in fp64.
#pragma once

#include "cuda/common/quantizer.h"
#include "cuda/common/search.h"

namespace qk::cuda {

constexpr int kTogether = 4;  // candidates in one pass

struct SearchScratch {
  TeamScratch ranges;
  double sums[kMaxTeam / kWarp][kTogether];
};

struct Errors {
  double v[kTogether];
};

// The sums of a team, in all of its threads, in an order that its size alone decides.
__device__ inline Errors combine(Errors mine, int team, SearchScratch& scratch) {
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
__device__ inline float unit_of(float most) {
  const int exponent = static_cast<int>(bits_of(most) >> 23);
  const int unit = exponent == 0 ? 126 : 127 - exponent;
  return float_of(static_cast<uint32_t>((unit > 126    ? 126
                                         : unit < -126 ? -126
                                                       : unit) +
                                        127)
                  << 23);
}

__host__ __device__ inline int tried(const ScaleSearch& how) {
  return (how.steps + 1) * (how.signs ? 2 : 1);
}

struct BlockSearch {
  Range range;  // about zero
  float absmax, unit;

  __device__ explicit BlockSearch(const Range& seen)
      : range{min_nan(seen.low, 0.0f), max_nan(seen.high, 0.0f)},
        absmax(seen.absmax()),
        unit(unit_of(absmax)) {}

  __device__ bool finite() const { return absmax < float_of(0x7F800000u); }

  __device__ ScaleAndZero scale_of(const ScaleSearch& how, int i) const {
    const bool negative = i > how.steps;
    if (negative) i -= how.steps + 1;
    const float part =
        i == 0 ? 1.0f : static_cast<float>(1.0 - how.range * static_cast<double>(i) / how.steps);
    if (!how.symmetric) {
      return asymmetric_scale(Range{mul_rn(range.low, part), mul_rn(range.high, part)}, how.q_min,
                              how.q_max, how.scale_dtype);
    }
    const float found = symmetric_scale(mul_rn(absmax, part), how.divisor, how.scale_dtype);
    return ScaleAndZero{negative ? -found : found, 0};
  }

  // kTogether of them from number `first` on; beyond the last, that one again.
  __device__ void prepare(const ScaleSearch& how, int first,
                          Candidate (&candidates)[kTogether]) const {
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const ScaleAndZero found = scale_of(how, min(first + j, tried(how) - 1));
      const float step = mul_rn(found.scale, unit), zero = static_cast<float>(found.zero_point);
      candidates[j] = {step, div_rn(1.0f, step), sub_rn(static_cast<float>(how.q_min), zero),
                       sub_rn(static_cast<float>(how.q_max), zero)};
    }
  }

  // The first n of eight values, from column `col` on.
  template <typename Element>
  __device__ void include(const ScaleSearch& how, const Candidate (&candidates)[kTogether],
                          const Chunk<Element>& values, int col, int n, Errors& errors) const {
    float sums[kTogether] = {};
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (i >= n) break;
      const float value = mul_rn(values[i], unit);
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const Candidate& c = candidates[j];
        const float code =
            static_cast<float>(round_to_int(fmaxf(c.low, fminf(c.high, mul_rn(value, c.inverse)))));
        const float off = fma_rn(code, c.step, -value);
        const float error = how.norm == 2.0f ? mul_rn(off, off)
                                             : powf(float_of(bits_of(off) & 0x7FFFFFFFu), how.norm);
        if (how.importance == nullptr) {
          sums[j] = add_rn(sums[j], error);
        } else {
          errors.v[j] += static_cast<double>(error) * static_cast<double>(how.importance[col + i]);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j) errors.v[j] += static_cast<double>(sums[j]);
  }
};

}  // namespace qk::cuda
