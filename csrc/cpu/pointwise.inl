// The table of pointwise.h for one ISA.
#include <cmath>

#include "cpu/exp2.inl"
#include "cpu/pointwise.h"

namespace qk::QK_ISA {
namespace {

// Sixteen running sums, added up in a fixed order.
QK_INLINE float total(F32 x) {
  float lanes[kLanes];
  store(lanes, x, Full{});
  for (int n = kLanes / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
  }
  return lanes[0];
}

template <class T>
void row_rms_norm(const T* x, const T* residual, const T* weight, int64_t n, float epsilon, T* sum,
                  T* out) {
  F32 even = broadcast(0.0f), odd = even;
  if (residual) {
    for_lanes(n, [&](int64_t i, auto lanes) {
      store(sum + i, load(x + i, lanes) + load(residual + i, lanes), lanes);
    });
    x = sum;
  }
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const F32 a = load(x + i, Full{}), b = load(x + i + kLanes, Full{});
    even = multiply_add(a, a, even);
    odd = multiply_add(b, b, odd);
  }
  for_lanes(n - i, [&](int64_t j, auto lanes) {
    const F32 a = load(x + i + j, lanes);
    even = multiply_add(a, a, even);
  });
  const F32 factor =
      broadcast(1.0f / std::sqrt(total(even + odd) / static_cast<float>(n) + epsilon));
  for_lanes(n, [&](int64_t j, auto lanes) {
    store(out + j, load(x + j, lanes) * factor * load(weight + j, lanes), lanes);
  });
}

// x / (1 + 2^(-x log2 e)). The power is kept finite: beyond 2^126 the quotient is 0 for all that is
// rounded to.
QK_INLINE F32 silu(F32 x) {
  const F32 power = exp2(min(broadcast(126.0f), x * broadcast(-1.44269504f)));
  return x / (broadcast(1.0f) + power);
}

template <class T>
void row_silu_mul(const T* gate, const T* up, int64_t n, T* out) {
  for_lanes(n, [&](int64_t i, auto lanes) {
    const F32 g = load(gate + i, lanes);
    // NaN passes through the division, but not through the power.
    store(out + i, silu(g) * load(up + i, lanes), lanes);
  });
}

template <class T>
void row_rotate(const T* x, const T* cosine, const T* sine, int64_t half, int64_t size, T* out) {
  for_lanes(half, [&](int64_t i, auto lanes) {
    const F32 a = load(x + i, lanes), b = load(x + half + i, lanes);
    const F32 first = a * load(cosine + i, lanes) - b * load(sine + i, lanes);
    const F32 second = b * load(cosine + half + i, lanes) + a * load(sine + half + i, lanes);
    store(out + i, first, lanes);
    store(out + half + i, second, lanes);
  });
  for_lanes(size - 2 * half, [&](int64_t i, auto lanes) {
    store(out + 2 * half + i, load(x + 2 * half + i, lanes), lanes);
  });
}

void rms_norm(DType dtype, const void* x, const void* residual, const void* weight, int64_t n,
              float epsilon, void* sum, void* out) {
  visit_float(dtype, [&]<class T>(T) {
    row_rms_norm(static_cast<const T*>(x), static_cast<const T*>(residual),
                 static_cast<const T*>(weight), n, epsilon, static_cast<T*>(sum),
                 static_cast<T*>(out));
  });
}

void silu_mul(DType dtype, const void* gate, const void* up, int64_t n, void* out) {
  visit_float(dtype, [&]<class T>(T) {
    row_silu_mul(static_cast<const T*>(gate), static_cast<const T*>(up), n, static_cast<T*>(out));
  });
}

void rotate(DType dtype, const void* x, const void* cosine, const void* sine, int64_t half,
            int64_t size, void* out) {
  visit_float(dtype, [&]<class T>(T) {
    row_rotate(static_cast<const T*>(x), static_cast<const T*>(cosine), static_cast<const T*>(sine),
               half, size, static_cast<T*>(out));
  });
}

}  // namespace

extern const PointwiseKernels pointwise;
const PointwiseKernels pointwise = {rms_norm, silu_mul, rotate};

}  // namespace qk::QK_ISA
