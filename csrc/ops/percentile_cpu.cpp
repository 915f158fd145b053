// percentile_scale on the CPU. The order of values is that of integers, whatever their dtype, so
// that finding the k-th needs no code for each instruction set.
#include <algorithm>
#include <cmath>
#include <functional>
#include <cstring>
#include <iterator>
#include <limits>
#include <vector>

#include "ops/search.h"

namespace qk::cpu {
namespace {

// Bits of the magnitude; or of the number, negative ones turned over, so that they sort as numbers
// do. The second is its own inverse.
template <class Key>
Key magnitude_key(Key bits) {
  return bits & std::numeric_limits<Key>::max();
}
template <class Key>
Key order_key(Key bits) {
  return bits < 0 ? bits ^ std::numeric_limits<Key>::max() : bits;
}

// fp32 of one element's bits.
float number_of(ScalarType, int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
float number_of(ScalarType dtype, int16_t bits) {
  const int32_t wide =
      static_cast<int32_t>(static_cast<uint32_t>(static_cast<uint16_t>(bits)) << 16);
  if (dtype == ScalarType::BFloat16) return number_of(ScalarType::Float, wide);
  const int exponent = bits >> 10 & 0x1f, mantissa = bits & 0x3ff;
  const float size = exponent == 0
                         ? std::ldexp(static_cast<float>(mantissa), -24)
                         : std::ldexp(static_cast<float>(mantissa | 0x400), exponent - 25);
  return bits < 0 ? -size : size;
}

// The k-th smallest of n, k from 0. Which ones lie before and after it is left as it comes.
template <class Key>
Key smallest(std::vector<Key>& keys, int64_t k) {
  // Near an end, where percentiles are, few elements pass by the heap of those that are further
  // out.
  const int64_t n = static_cast<int64_t>(keys.size()), above = n - k;
  if (above <= n / 16) {
    std::partial_sort(keys.begin(), keys.begin() + above, keys.end(), std::greater<>());
    return keys[above - 1];
  }
  if (k < n / 16) {
    std::partial_sort(keys.begin(), keys.begin() + k + 1, keys.end());
  } else {
    std::nth_element(keys.begin(), keys.begin() + k, keys.end());
  }
  return keys[k];
}

struct Ends {
  float low, high;
};

// What the percentile leaves of a block. The element of a percentage is the one that has so many of
// n below or beside it.
template <class Key>
Ends ends_of(const Tensor& x, int64_t row, int64_t rows, int64_t col, int64_t cols,
             double percentile, bool symmetric, std::vector<Key>& keys) {
  keys.clear();
  for (int64_t r = row; r < row + rows; ++r) {
    const Key* bits = reinterpret_cast<const Key*>(element(x, r * x.stride(0) + col));
    if (symmetric) {
      std::transform(bits, bits + cols, std::back_inserter(keys), magnitude_key<Key>);
    } else {
      std::transform(bits, bits + cols, std::back_inserter(keys), order_key<Key>);
    }
  }
  const int64_t n = rows * cols;
  const int64_t wanted =
      static_cast<int64_t>(std::ceil(static_cast<double>(n) * (percentile / 100)));
  const int64_t k = std::max<int64_t>(wanted, 1) - 1;
  const Key high = smallest(keys, k);
  if (symmetric) return {0.0f, number_of(x.scalar_type(), high)};
  const Key low = smallest(keys, n - 1 - k);
  return {number_of(x.scalar_type(), order_key(low)), number_of(x.scalar_type(), order_key(high))};
}

}  // namespace

std::tuple<Tensor, Tensor> percentile_scale(const Tensor& x, const Block& block, double percentile,
                                            int64_t q_min, int64_t q_max, bool symmetric,
                                            double divisor, ScalarType scale_dtype) {
  constexpr auto kOp = "percentile_scale";
  const Grid grid = check_matrix(kOp, x, block);
  check_float(kOp, "x", x);
  check_rows(kOp, "x", x);
  check_search_codes(kOp, q_min, q_max, symmetric, divisor);
  check_scale_dtype(kOp, scale_dtype);
  check_percentile(kOp, percentile);
  check_finite(kOp, absmax(x, block));
  Tensor low = empty(x, {grid.rows, grid.cols}, ScalarType::Float);
  Tensor high = empty(x, {grid.rows, grid.cols}, ScalarType::Float);
  float *const lows = data<float>(low), *const highs = data<float>(high);
  const int64_t size = grid.block_rows * grid.block_cols;
  const auto visit = [&]<class Key>(Key) {
    // An element of a selection costs some ten of an ordinary pass.
    parallel_rows(grid.rows * grid.cols, 10 * size, [&](int64_t begin, int64_t end) {
      std::vector<Key> keys;
      keys.reserve(size);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i / grid.cols * grid.block_rows, col = i % grid.cols * grid.block_cols;
        const Ends ends =
            ends_of(x, row, std::min(grid.block_rows, x.size(0) - row), col,
                    std::min(grid.block_cols, x.size(1) - col), percentile, symmetric, keys);
        lows[i] = ends.low;
        highs[i] = ends.high;
      }
    });
  };
  if (x.scalar_type() == ScalarType::Float) {
    visit(int32_t{});
  } else {
    visit(int16_t{});
  }
  if (symmetric)
    return {symmetric_scale(high, divisor, scale_dtype), empty(x, {0}, ScalarType::Char)};
  return asymmetric_scale(low, high, q_min, q_max, scale_dtype);
}

}  // namespace qk::cpu

STABLE_TORCH_LIBRARY_IMPL(quantkit, CPU, m) {
  m.impl("percentile_scale", TORCH_BOX(&qk::cpu::percentile_scale));
}
