// See reduce.h. Columns are folded row by row into one row of extremes in x's own dtype; a row is
// folded by groups.
#pragma once

#include "cpu/numeric.inl"
#include "cpu/reduce.h"

namespace qk::QK_ISA {
namespace {

template <class T>
QK_INLINE float from_key(int key) {
  T value;
  const typename Keys<T>::Scalar narrow = static_cast<typename Keys<T>::Scalar>(key);
  std::memcpy(&value, &narrow, sizeof(value));
  return to_float(value);
}
template <class T>
QK_INLINE float from_order_key(int key) {
  return from_key<T>(key ^ ((key >> 31) & (sizeof(T) == 2 ? 0x7fff : 0x7fffffff)));
}

// f(keys) for all n elements; some may be seen twice, which changes no extreme.
template <class T, class Body>
QK_INLINE void for_keys(const T* x, int64_t n, Body body) {
  constexpr int kCount = Keys<T>::kCount;
  if (n < kCount) return body(load_keys(x, n));
  for (int64_t i = 0; i + kCount <= n; i += kCount) body(Keys<T>::load(x + i));
  if (n % kCount != 0) body(Keys<T>::load(x + n - kCount));
}

template <class T>
QK_INLINE float span_absmax(const T* x, int64_t n) {
  using K = Keys<T>;
  auto most = K::broadcast(0);
  for_keys(x, n, [&](typename K::Vec keys) { most = K::max(most, K::abs(keys)); });
  return from_key<T>(K::reduce_max(most));
}

template <class T>
QK_INLINE void span_minmax(const T* x_low, const T* x_high, int64_t n, float* low, float* high) {
  using K = Keys<T>;
  using Scalar = typename K::Scalar;
  constexpr Scalar kMost = static_cast<Scalar>(sizeof(T) == 2 ? 0x7fff : 0x7fffffff);
  auto least = K::broadcast(kMost), most = K::broadcast(static_cast<Scalar>(~kMost));
  if (x_low == x_high) {
    for_keys(x_low, n, [&](typename K::Vec keys) {
      keys = K::order(keys);
      least = K::min(least, keys);
      most = K::max(most, keys);
    });
  } else {
    for_keys(x_low, n, [&](typename K::Vec keys) { least = K::min(least, K::order(keys)); });
    for_keys(x_high, n, [&](typename K::Vec keys) { most = K::max(most, K::order(keys)); });
  }
  const float a = from_order_key<T>(K::reduce_min(least)),
              b = from_order_key<T>(K::reduce_max(most));
  // A NaN lies beyond the infinity of its own sign, so it shows on one side only.
  *low = b != b ? b : a;
  *high = a != a ? a : b;
}

// Extremes of each column over all rows. A bundle of rows is folded in registers before the running
// extremes are touched, and few enough rows are read at once for the hardware to prefetch each of
// them.
constexpr int kBundle = 8;

template <class T, class Body>
QK_INLINE void for_bundles(const T* x, int64_t stride, int64_t rows, int64_t cols, Body body) {
  constexpr int kCount = Keys<T>::kCount;
  for (int64_t r = 0; r < rows; r += kBundle) {
    const int n = static_cast<int>(rows - r < kBundle ? rows - r : kBundle);
    const T* top = x + r * stride;
    if (cols < kCount) {
      body(r == 0, 0, n, [=](int k) { return load_keys(top + k * stride, cols); });
      continue;
    }
    for (int64_t j = 0; j < cols; j += kCount) {
      const int64_t c =
          j + kCount <= cols ? j : cols - kCount;  // the last vector overlaps the one before
      body(r == 0, c, n, [=](int k) { return Keys<T>::load(top + k * stride + c); });
    }
  }
}

template <class T>
void columns_absmax(const T* x, int64_t stride, int64_t rows, int64_t cols, T* out) {
  using K = Keys<T>;
  auto* keys = reinterpret_cast<typename K::Scalar*>(out);
  for_bundles(x, stride, rows, cols, [&](bool first, int64_t c, int n, auto load_row) {
    auto most = K::abs(load_row(0));
    for (int k = 1; k < n; ++k) most = K::max(most, K::abs(load_row(k)));
    K::store(keys + c, first ? most : K::max(most, K::load(keys + c)));
  });
}

template <class T>
void columns_minmax(const T* x, int64_t stride, int64_t rows, int64_t cols, T* low, T* high) {
  using K = Keys<T>;
  auto* low_keys = reinterpret_cast<typename K::Scalar*>(low);
  auto* high_keys = reinterpret_cast<typename K::Scalar*>(high);
  for_bundles(x, stride, rows, cols, [&](bool first, int64_t c, int n, auto load_row) {
    auto least = K::order(load_row(0)), most = least;
    for (int k = 1; k < n; ++k) {
      const auto keys = K::order(load_row(k));
      least = K::min(least, keys);
      most = K::max(most, keys);
    }
    // Kept as plain values of T between bundles: `order` is its own inverse.
    K::store(low_keys + c,
             K::order(first ? least : K::min(least, K::order(K::load(low_keys + c)))));
    K::store(high_keys + c,
             K::order(first ? most : K::max(most, K::order(K::load(high_keys + c)))));
  });
}

template <class T>
void block_row_absmax(const T* x, int64_t stride, int64_t rows, int64_t cols, int64_t block_cols,
                      void* scratch, float* out) {
  if (rows > 1) {
    T* folded = static_cast<T*>(scratch);
    columns_absmax(x, stride, rows, cols, folded);
    x = folded;
  }
  if (block_cols == 1) {
    for_lanes(cols,
              [&](int64_t i, auto lanes) { store(out + i, magnitude(load(x + i, lanes)), lanes); });
    return;
  }
  for_groups(cols, block_cols,
             [&](int64_t g, int64_t first, int64_t n) { out[g] = span_absmax(x + first, n); });
}

template <class T>
void block_row_minmax(const T* x, int64_t stride, int64_t rows, int64_t cols, int64_t block_cols,
                      void* scratch, float* low, float* high) {
  const T *x_low = x, *x_high = x;
  if (rows > 1) {
    T* folded_low = static_cast<T*>(scratch);
    T* folded_high = static_cast<T*>(scratch) + reduce_scratch_bytes(cols) / (2 * sizeof(T));
    columns_minmax(x, stride, rows, cols, folded_low, folded_high);
    x_low = folded_low;
    x_high = folded_high;
  }
  if (block_cols == 1) {
    for_lanes(cols, [&](int64_t i, auto lanes) {
      const F32 a = load(x_low + i, lanes), b = load(x_high + i, lanes);
      store(low + i, from_bits(select(is_nan(b), bits(b), bits(a))), lanes);
      store(high + i, from_bits(select(is_nan(a), bits(a), bits(b))), lanes);
    });
    return;
  }
  for_groups(cols, block_cols, [&](int64_t g, int64_t first, int64_t n) {
    span_minmax(x_low + first, x_high + first, n, low + g, high + g);
  });
}

}  // namespace
}  // namespace qk::QK_ISA
