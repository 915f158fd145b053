// From the sums of a product to its results: scales of rows, bias, rounding; eight neighbours of a
// row at a time.
#pragma once

#include "cuda/common/gemm_weights.h"

namespace qk::cuda {

template <typename Weight>
struct SumOfScaling {
  using Type = float;
};
template <>
struct SumOfScaling<WeightInt8> {
  using Type = int32_t;
};
template <typename Weight>
using SumOf = typename SumOfScaling<Weight>::Type;

// Numbers from one row to the next of the sums that a split of K leaves.
__host__ __device__ inline int part_pitch(int cols) {
  return (cols + kChunk - 1) / kChunk * kChunk;
}

__device__ inline float load_number(const void* data, DType dtype, int64_t index) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[index];
  const uint32_t bits = static_cast<const uint16_t*>(data)[index];
  return dtype == DType::kBFloat16 ? float_of(bits << 16) : widen_float16(bits);
}

__device__ inline float round_to(DType dtype, float value) {
  if (dtype == DType::kBFloat16) return float_of(narrow_bfloat16x2(value, 0.0f) << 16);
  if (dtype == DType::kFloat16) return widen_float16(narrow_float16x2(value, 0.0f) & 0xFFFFu);
  return value;
}

__device__ inline int64_t offset_of(const Experts& experts, int e) {
  return experts.wide ? static_cast<const int64_t*>(experts.offsets)[e]
                      : static_cast<const int32_t*>(experts.offsets)[e];
}

// The same within so many rows: nobody has looked at the offsets, and whatever they are, no row
// beyond the last is touched.
__device__ inline int row_bound(const Experts& experts, int e, int rows) {
  return static_cast<int>(max(min(offset_of(experts, e), int64_t{rows}), int64_t{0}));
}

// Whose row it is: the last expert that begins at it or before.
__device__ inline int expert_of(const Experts& experts, int row) {
  int low = 0, high = experts.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (offset_of(experts, middle) <= row) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Where the scale of a channel lies among those of its expert.
__device__ inline int64_t scale_index(const GroupScales& scales, int col, int group) {
  if (scales.by_panels)
    return (int64_t{col / kPanel} * scales.groups + group) * kPanel + col % kPanel;
  return int64_t{col / scales.rows} * scales.groups + group;
}

// The same for one channel after the other, with one division for all of them; channels beyond the
// last read like it.
struct ScaleWalk {
  int64_t at;
  int left, until_next, rows;
  int64_t step;

  __device__ ScaleWalk(const GroupScales& scales, int col, int cols, int group)
      : at(scale_index(scales, min(col, cols - 1), group)),
        left(cols - 1 - col),
        until_next(scales.by_panels ? 1 : scales.rows - col % scales.rows),
        rows(scales.by_panels ? 1 : scales.rows),
        step(scales.by_panels ? 1 : scales.groups) {}

  __device__ int64_t next() {
    const int64_t now = at;
    if (left-- > 0 && --until_next == 0) {
      at += step;
      until_next = rows;
    }
    return now;
  }
};

// Words of the channels col to col + 7 in a word row of the weight.
__device__ inline void load_words(const PackedWeight& weight, int expert, int col, int word_row,
                                  uint32_t (&words)[kChunk]) {
  const uint32_t* const from = static_cast<const uint32_t*>(weight.words) +
                               expert * weight.expert_words + col / kPanel * weight.panel_words +
                               int64_t{word_row} * kPanel + col % kPanel;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Words4 four = load_vector<Words4>(from + half * 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) words[half * 4 + i] = four.w[i];
  }
}

// What the columns that were left out add, before the weight's scale.
__device__ inline void multiply_wide(const GemmArgs& args, int expert, int row, int col,
                                     float (&extra)[kChunk]) {
  const Matrix& x = args.wide.x;
  for (int j = 0; j < *args.wide.count; ++j) {
    const int k = args.wide.columns[j];
    const float value = load_number(x.data, x.dtype, row * x.row_stride + k * x.col_stride);
    uint32_t words[kChunk];
    load_words(args.weight, expert, col, k / 4, words);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const auto code = static_cast<int8_t>(words[i] >> (k % 4 * 8));
      extra[i] = fma_rn(value, static_cast<float>(code), extra[i]);
    }
  }
}

__device__ inline void store_sums(int32_t* target, const int32_t (&values)[kChunk], int n) {
  const auto* const words = reinterpret_cast<const uint32_t*>(values);
  if (n == kChunk && aligned_to(target, 16)) {
    store_vector(target, Words4{{words[0], words[1], words[2], words[3]}});
    store_vector(target + 4, Words4{{words[4], words[5], words[6], words[7]}});
    return;
  }
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    if (i < n) target[i] = values[i];
  }
}

// y of columns col to col + n, scaled but for the bias, to where results go.
__device__ inline void store_results(const GemmArgs& args, int expert, int row, int col, int n,
                                     float (&y)[kChunk]) {
  const GemmOutput& out = args.out;
  const int cols = args.weight.out_features;
  if (out.bias != nullptr) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (i >= n) break;
      y[i] = add_rn(y[i], load_number(out.bias, out.bias_dtype, int64_t{expert} * cols + col + i));
    }
  }
  if (out.row_scale != nullptr) {
    const float scale = out.row_scale[row];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) y[i] = mul_rn(round_to(out.dtype, y[i]), scale);
  }
  const int64_t at = int64_t{row} * cols + col;
  if (out.dtype == DType::kFloat32) {
    store_chunk<Float32>(static_cast<float*>(out.data) + at, y, n);
  } else if (out.dtype == DType::kBFloat16) {
    store_chunk<BFloat16>(static_cast<uint16_t*>(out.data) + at, y, n);
  } else {
    store_chunk<Float16>(static_cast<uint16_t*>(out.data) + at, y, n);
  }
}

template <typename Weight>
__device__ void finish_chunk(const GemmArgs& args, int expert, int row, int col,
                             SumOf<Weight> (&sums)[kChunk]) {
  const int left = args.weight.out_features - col, n = left < kChunk ? left : kChunk;
  if (n <= 0) return;
  float y[kChunk];
  if constexpr (Weight::kScaling == Scaling::kRows) {
    const RowScales& scales = args.scales;
    if (scales.zero != nullptr) {
      uint32_t of_column[kChunk];
      load_words(args.weight, expert, col, args.weight.word_rows, of_column);
      const auto zero = static_cast<uint32_t>(scales.zero[row]);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        sums[i] = static_cast<int32_t>(static_cast<uint32_t>(sums[i]) - zero * of_column[i]);
      }
    }
    if (args.out.sums) {
      store_sums(
          static_cast<int32_t*>(args.out.data) + int64_t{row} * args.weight.out_features + col,
          sums, n);
      return;
    }
    const bool wide = args.wide.count != nullptr && *args.wide.count > 0;
    float extra[kChunk] = {};
    if (wide) multiply_wide(args, expert, row, col, extra);
    const float input = scales.input[row];
    const int64_t base =
        scales.one_weight ? expert : int64_t{expert} * args.weight.out_features + col;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const float weight = scales.weight[base + (scales.one_weight || i >= n ? 0 : i)];
      y[i] = mul_rn(static_cast<float>(sums[i]), mul_rn(input, weight));
      if (wide) y[i] = add_rn(y[i], mul_rn(extra[i], weight));
    }
  } else if constexpr (Weight::kScaling == Scaling::kIntGroups) {
    const float input = args.scales.input[row];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) y[i] = mul_rn(sums[i], input);
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) y[i] = sums[i];
    if constexpr (Weight::kNanRow) {
      uint32_t nan[kChunk];
      load_words(args.weight, expert, col, args.weight.word_rows, nan);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) y[i] = nan[i] != 0 ? float_of(nan[i]) : y[i];
    }
  }
  store_results(args, expert, row, col, n, y);
}

}  // namespace qk::cuda
