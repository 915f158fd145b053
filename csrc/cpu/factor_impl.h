// See factor.h. An ISA's file says what a tile in registers is: kRows rows of kVectors vectors.
#pragma once

#include <cmath>

#include "cpu/factor.h"
#include "cpu/numeric.inl"
#include "cpu/transpose.inl"

namespace qk::QK_ISA {
namespace {

constexpr int kWidth = kVectors * kLanes;
constexpr int64_t kDepth = 128;  // so much of a stripe stays in the L1 cache

struct Tile {
  F32 sum[kRows][kVectors];
};

// sum of a[k * a_stride + i] * b[k][width].
QK_INLINE Tile products(const float* a, int64_t a_stride, const float* b, int64_t depth) {
  Tile tile;
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) tile.sum[i][v] = broadcast(0.0f);
  }
  for (int64_t k = 0; k < depth; ++k) {
    F32 right[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) right[v] = load(b + k * kWidth + v * kLanes, Full{});
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const F32 left = broadcast(a[k * a_stride + i]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        tile.sum[i][v] = multiply_add(left, right[v], tile.sum[i][v]);
      }
    }
  }
  return tile;
}

// x = finish(x, sum), number by number.
template <class Finish>
QK_INLINE void finish_tile(const Tile& tile, float* x, Finish finish) {
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* const p = x + i * kWidth + v * kLanes;
      store(p, finish(load(p, Full{}), tile.sum[i][v]), Full{});
    }
  }
}

void product(const float* a, int64_t a_stripe, const float* b, int64_t depth, int64_t rows,
             const float* start, int64_t start_stride, int64_t start_rows, int64_t start_cols,
             float* x) {
  const F32 zero = broadcast(0.0f);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < kWidth; c += kLanes) {
      F32 first = zero;
      if (start && i < start_rows && c < start_cols) {
        const float* p = start + i * start_stride + c;
        first = zero - (start_cols - c >= kLanes ? load(p, Full{}) : load(p, Part(start_cols - c)));
      }
      store(x + i * kWidth + c, first, Full{});
    }
  }
  for (int64_t k = 0; k < depth; k += kDepth) {
    const int64_t n = depth - k < kDepth ? depth - k : kDepth;
    for (int64_t i = 0; i < rows; i += kRows) {
      // Sums of their own, which are small: added to x one by one, they would take on its error.
      finish_tile(
          products(a + i / kWidth * a_stripe + k * kWidth + i % kWidth, kWidth, b + k * kWidth, n),
          x + i * kWidth, [](F32 old, F32 sum) { return old + sum; });
    }
  }
}

void triangle(const float* inverse, int64_t n, float* x) {
  for (int64_t i = 0; i < n; i += kRows) {
    finish_tile(products(inverse + i * n + i, n, x + i * kWidth, n - i), x + i * kWidth,
                [](F32, F32 sum) { return broadcast(0.0f) - sum; });
  }
}

void turn(const float* x, int64_t rows, float* out, int64_t stride) {
  int64_t k = 0;
  for (; k + kLanes <= rows; k += kLanes) {
    for (int c = 0; c < kWidth; c += kLanes) {
      transpose(x + k * kWidth + c, kWidth, out + c * stride + k, stride);
    }
  }
  for (; k < rows; ++k) {
    for (int c = 0; c < kWidth; ++c) out[c * stride + k] = x[k * kWidth + c];
  }
}

// y += factor * x for n numbers.
QK_INLINE void add_row(double factor, const double* x, int64_t n, double* y) {
  for (int64_t i = 0; i < n; ++i) y[i] += factor * x[i];
}

QK_INLINE void divide_row(double divisor, int64_t n, double* x) {
  for (int64_t i = 0; i < n; ++i) x[i] /= divisor;
}

int64_t diagonal(double* h, int64_t n, double* inverse) {
  for (int64_t j = n - 1; j >= 0; --j) {
    double* const row = h + j * n;
    if (!(row[j] > 0.0)) return n - 1 - j;  // NaN is not positive either
    divide_row(std::sqrt(row[j]), j + 1, row);
    for (int64_t i = 0; i < j; ++i) add_row(-row[i], row, i + 1, h + i * n);
  }
  for (int64_t i = 0; i < n; ++i) {
    double* const row = inverse + i * n;
    for (int64_t c = 0; c < n; ++c) row[c] = 0.0;
    for (int64_t k = 0; k < i; ++k) add_row(-h[i * n + k], inverse + k * n, k + 1, row);
    row[i] = 1.0;
    divide_row(h[i * n + i], i + 1, row);
  }
  return n;
}

}  // namespace
}  // namespace qk::QK_ISA
