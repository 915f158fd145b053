// See awq.h. An ISA's file says what a tile in registers is: kRows rows of kVectors vectors. Its
// Words are one fp32 number each; an ISA with units for pairs of bf16 numbers defines PairWords.
#pragma once

#include "cpu/awq.h"
#include "cpu/reduce_impl.h"
#include "cpu/scale_impl.h"

namespace qk::QK_ISA {
namespace {

constexpr int kTile = kVectors * kLanes;
constexpr int64_t kDepth = 512;  // words: a tile of g so deep stays in the L2 cache

struct FloatWords {
  using Word = float;
  using Element = float;  // of the errors
  static constexpr int kNumbers = 1;
  static QK_INLINE F32 add(F32 sum, const Element* a, F32 b) {
    return multiply_add(broadcast(*a), b, sum);
  }
  static QK_INLINE F32 load_vector(const Word* p) { return load(p, Full{}); }
  static QK_INLINE void store_vector(Word* p, const F32* rows) { store(p, rows[0], Full{}); }
  template <class Lanes>
  static QK_INLINE void store_errors(Element* p, F32 x, Lanes lanes) {
    store(p, x, lanes);
  }
};

// 2 (g - V V^T) in row i and the 16 columns from `first` on, right of the diagonal; else 0.
QK_INLINE F32 upper(const AwqGram& gram, const float* g, int64_t stride, int64_t i, int64_t first) {
  const int64_t n = gram.cols - first;
  if (i >= gram.cols || n <= 0) return broadcast(0.0f);
  const float* row = g + i * stride + first;
  F32 x = n >= kLanes ? load(row, Full{}) : load(row, Part(n));
  for (int f = 0; f < gram.factor_cols; ++f) {
    x = x - broadcast(gram.factors[i * gram.factor_cols + f]) *
                load(gram.across + f * gram.padded + first, Full{});
  }
  x = x + x;
  if (i < first) return x;
  float copy[kLanes];
  store(copy, x, Full{});
  for (int64_t j = 0; j < kLanes && first + j <= i; ++j) copy[j] = 0.0f;
  return load(copy, Full{});
}

template <class Words>
void pack_stripe(const AwqGram& gram, const float* g, int64_t stride, int64_t first) {
  constexpr int kNumbers = Words::kNumbers;
  const int64_t depth = first + kTile < gram.cols ? first + kTile : gram.cols;
  auto* out = static_cast<typename Words::Word*>(gram.words) +
              awq_words_before(first / kTile, kTile, kNumbers == 2);
  for (int64_t i = 0; i < depth; i += kNumbers, out += kTile) {
    for (int v = 0; v < kVectors; ++v) {
      F32 rows[kNumbers];
      for (int k = 0; k < kNumbers; ++k) {
        rows[k] = upper(gram, g, stride, i + k, first + v * kLanes);
      }
      Words::store_vector(out + v * kLanes, rows);
    }
  }
}

// Scales and zero points of the groups of n rows of values.
inline void fit_scales(const AwqGram& gram, const AwqQuantizer& how, float clip, int64_t n,
                       int64_t groups, const AwqScratch& scratch) {
  float *low = scratch.extremes, *high = low + kRows * groups, *scale = high + kRows * groups;
  for (int64_t r = 0; r < n; ++r) {
    const float* x = scratch.values + r * gram.padded;
    if (how.symmetric) {
      block_row_absmax(x, 0, 1, gram.cols, how.group, nullptr, high + r * groups);
    } else {
      block_row_minmax(x, 0, 1, gram.cols, how.group, nullptr, low + r * groups, high + r * groups);
    }
  }
  if (how.symmetric) {
    for (int64_t i = 0; i < n * groups; ++i) high[i] *= clip;
    symmetric_scales(high, n * groups, how.divisor, how.scale_dtype, scale);
  } else {
    for (int64_t i = 0; i < n * groups; ++i) low[i] *= clip, high[i] *= clip;
    asymmetric_scales(low, high, n * groups, how.q_min, how.q_max, how.scale_dtype, scale,
                      scratch.zero);
  }
}

// Errors of n rows from `first` on: in fp32 in values, where the factors want them, and as Words
// has them. Begins the rows' sums with what the diagonal gives.
template <class Words, class T>
void make_errors(const AwqGram& gram, const AwqQuantizer& how, const AwqRows& rows, int64_t first,
                 int64_t n, const AwqScratch& scratch) {
  const int64_t cols = gram.cols, groups = (cols + how.group - 1) / how.group;
  for (int64_t r = 0; r < n; ++r) {
    const T* w = static_cast<const T*>(rows.w) + (first + r) * rows.stride;
    float* out = scratch.values + r * gram.padded;
    for_lanes(cols, [&](int64_t i, auto lanes) {
      store(out + i, load(w + i, lanes) * load(rows.scale + i, lanes), lanes);
    });
  }
  fit_scales(gram, how, rows.clip, n, groups, scratch);
  const float* scale = scratch.extremes + 2 * kRows * groups;
  for (int64_t r = 0; r < n; ++r) {
    float* values = scratch.values + r * gram.padded;
    auto* errors =
        static_cast<typename Words::Element*>(scratch.errors) + (first + r) * gram.padded;
    F32 sum = broadcast(0.0f);
    for_groups(cols, how.group, [&](int64_t g, int64_t begin, int64_t count) {
      const int zero = how.symmetric ? 0 : scratch.zero[r * groups + g];
      const F32 step = broadcast(scale[r * groups + g]);
      const F32 inverse = broadcast(1.0f / scale[r * groups + g]);
      const F32 least = broadcast(static_cast<float>(how.q_min - zero));
      const F32 most = broadcast(static_cast<float>(how.q_max - zero));
      for_lanes(count, [&](int64_t j, auto lanes) {
        const int64_t i = begin + j;
        const F32 x = load(values + i, lanes);
        const F32 code = to_float(round(max(least, min(most, x * inverse))));
        const F32 error =
            multiply_add(code, step, broadcast(0.0f) - x) * load(rows.inverse + i, lanes);
        // NaN, which rounding would take for a number, is in x still.
        sum = multiply_add(error * error, load(gram.diagonal + i, lanes), sum);
        store(values + i, error, lanes);
        Words::store_errors(errors + i, error, lanes);
      });
    });
    store(scratch.sums + (first + r) * kLanes, sum, Full{});
  }
}

// Adds the squares of values * V to the sums of kRows rows; V has kCount vectors of columns.
template <int kCount>
void add_factors(const AwqGram& gram, const float* values, float* sums) {
  F32 sum[kRows][kCount];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kCount; ++v) sum[i][v] = broadcast(0.0f);
  }
  const float* factors = gram.factors;
  for (int64_t k = 0; k < gram.cols; ++k, factors += kCount * kLanes) {
    F32 right[kCount];
#pragma GCC unroll 4
    for (int v = 0; v < kCount; ++v) right[v] = load(factors + v * kLanes, Full{});
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const F32 left = broadcast(values[i * gram.padded + k]);
#pragma GCC unroll 4
      for (int v = 0; v < kCount; ++v) sum[i][v] = multiply_add(left, right[v], sum[i][v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    F32 all = load(sums + i * kLanes, Full{});
#pragma GCC unroll 4
    for (int v = 0; v < kCount; ++v) all = multiply_add(sum[i][v], sum[i][v], all);
    store(sums + i * kLanes, all, Full{});
  }
}

// Adds (errors * g) * errors to the sums of kRows rows: `depth` words of g's rows, and the columns
// of one stripe. `left` are the errors of those rows of g, `right` those of the stripe's columns.
template <class Words>
QK_INLINE void add_tile(const typename Words::Element* left, const typename Words::Element* right,
                        int64_t stride, const typename Words::Word* g, int64_t depth, float* sums) {
  F32 sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[i][v] = broadcast(0.0f);
  }
  for (int64_t k = 0; k < depth; ++k) {
    decltype(Words::load_vector(g)) b[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) b[v] = Words::load_vector(g + k * kTile + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        sum[i][v] = Words::add(sum[i][v], left + i * stride + k * Words::kNumbers, b[v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    F32 all = load(sums + i * kLanes, Full{});
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      all = multiply_add(sum[i][v], load(right + i * stride + v * kLanes, Full{}), all);
    }
    store(sums + i * kLanes, all, Full{});
  }
}

template <class Words>
void add_stripes(const AwqGram& gram, int64_t rows, const AwqScratch& scratch) {
  using Element = typename Words::Element;
  const auto* errors = static_cast<const Element*>(scratch.errors);
  const auto* words = static_cast<const typename Words::Word*>(gram.words);
  for (int64_t first = 0; first < gram.cols; first += kTile) {
    const int64_t end = first + kTile < gram.cols ? first + kTile : gram.cols;
    const int64_t depth = (end + Words::kNumbers - 1) / Words::kNumbers;
    const auto* stripe = words + awq_words_before(first / kTile, kTile, Words::kNumbers == 2);
    for (int64_t k = 0; k < depth; k += kDepth) {
      const int64_t count = kDepth < depth - k ? kDepth : depth - k;
      for (int64_t r = 0; r < rows; r += kRows) {
        const Element* row = errors + r * gram.padded;
        add_tile<Words>(row + k * Words::kNumbers, row + first, gram.padded, stripe + k * kTile,
                        count, scratch.sums + r * kLanes);
      }
    }
  }
}

template <class Words>
double block_loss(const AwqGram& gram, const AwqQuantizer& how, const AwqRows& rows,
                  const AwqScratch& scratch) {
  for (int64_t r = 0; r < rows.rows; r += kRows) {
    const int64_t n = kRows < rows.rows - r ? kRows : rows.rows - r;
    visit_float(rows.dtype,
                [&]<class T>(T) { make_errors<Words, T>(gram, how, rows, r, n, scratch); });
    float* const sums = scratch.sums + r * kLanes;
    if (gram.factor_cols == kLanes) add_factors<1>(gram, scratch.values, sums);
    if (gram.factor_cols == 2 * kLanes) add_factors<2>(gram, scratch.values, sums);
  }
  add_stripes<Words>(gram, rows.rows, scratch);
  double loss = 0.0;
  for (int64_t i = 0; i < rows.rows * kLanes; ++i) loss += static_cast<double>(scratch.sums[i]);
  return loss;
}

}  // namespace
}  // namespace qk::QK_ISA
