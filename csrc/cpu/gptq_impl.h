// See gptq.h. An ISA's file says how many vectors of rows and how many columns a tile in registers
// has: kVectors, kColumns.
#pragma once

#include "cpu/gptq.h"
#include "cpu/scale_impl.h"

namespace qk::QK_ISA {
namespace {

constexpr int kPanel = kVectors * kLanes;
constexpr int64_t kDepth = 256;  // errors of so many columns of a panel stay in the cache

inline void pack_factor(const float* factor, const float* diagonal, int64_t stride, int64_t first,
                        int64_t width, int64_t begin, int64_t end, int64_t depth, float* packed) {
  for (int64_t k = begin; k < end; ++k) {
    const float* row = factor + k * stride + first;
    for (int64_t c = 0; c < width; c += kColumns) {
      float* out = packed + c * depth + k * kColumns;
      for (int j = 0; j < kColumns; ++j)
        out[j] = c + j < width ? row[c + j] / diagonal[c + j] : 0.0f;
    }
  }
}

// values[column + j] += sum of values[k] * factor[k][j], k in [begin, end): the values before
// `column` are by how much the weights fell.
QK_INLINE void update(float* values, int64_t column, int64_t begin, int64_t end,
                      const float* factor) {
  F32 sum[kColumns][kVectors];
  float* const out = values + column * kPanel;
#pragma GCC unroll 16
  for (int j = 0; j < kColumns; ++j) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sum[j][v] = load(out + j * kPanel + v * kLanes, Full{});
    }
  }
  for (int64_t k = begin; k < end; ++k) {
    F32 error[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) error[v] = load(values + k * kPanel + v * kLanes, Full{});
#pragma GCC unroll 16
    for (int j = 0; j < kColumns; ++j) {
      const F32 share = broadcast(factor[k * kColumns + j]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[j][v] = multiply_add(error[v], share, sum[j][v]);
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < kColumns; ++j) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      store(out + j * kPanel + v * kLanes, sum[j][v], Full{});
    }
  }
}

// The numbers w by `scale` and `zero`, as codes less the zero point.
QK_INLINE I32 code_of(const GptqStripe& stripe, F32 w, F32 scale, F32 zero) {
  const F32 low = broadcast(static_cast<float>(stripe.q_min));
  const F32 high = broadcast(static_cast<float>(stripe.q_max));
  return round(max(low - zero, min(high - zero, w * (broadcast(1.0f) / scale))));
}

// Per row, the sum over the stripe's columns of ((q - w) * the factor's diagonal)^2.
QK_INLINE F32 rounding_error(const GptqStripe& stripe, const float* values, F32 scale, F32 zero) {
  F32 sum = broadcast(0.0f);
  const F32 inverse = broadcast(1.0f) / scale;
  const F32 low = broadcast(static_cast<float>(stripe.q_min)) - zero;
  const F32 high = broadcast(static_cast<float>(stripe.q_max)) - zero;
  for (int64_t c = 0; c < stripe.width; ++c) {
    const F32 w = load(values + c * kPanel, Full{});
    const I32 code = round(max(low, min(high, w * inverse)));
    const F32 error = (to_float(code) * scale - w) * broadcast(stripe.diagonal[c]);
    sum = sum + error * error;
  }
  return sum;
}

// `values`: the stripe's weights as they are now.
inline void fit_to(const GptqStripe& stripe, const GptqPanel& panel, const float* values) {
  float low[kPanel], high[kPanel], least[kPanel], most[kPanel], found[kPanel], error[kPanel];
  for (int v = 0; v < kPanel; v += kLanes) {
    F32 lowest = broadcast(0.0f), highest = lowest;
    for (int64_t c = 0; c < stripe.width; ++c) {
      const F32 w = load(values + c * kPanel + v, Full{});
      lowest = min(lowest, w);
      highest = max(highest, w);
    }
    if (stripe.symmetric) highest = max(highest, broadcast(0.0f) - lowest);
    store(low + v, lowest, Full{});
    store(high + v, highest, Full{});
    store(error + v, from_bits(broadcast(0x7f800000)), Full{});
  }
  float* const scale = panel.scale + stripe.group[0] * kPanel;
  float* const zero = panel.zero + stripe.group[0] * kPanel;
  for (int i = 0; i < stripe.shrinks; ++i) {
    int8_t code[kPanel] = {};
    for (int r = 0; r < kPanel; ++r) {
      least[r] = low[r] * stripe.shrink[i];
      most[r] = high[r] * stripe.shrink[i];
    }
    if (stripe.symmetric) {
      symmetric_scales(most, kPanel, stripe.divisor, stripe.scale_dtype, found);
    } else {
      asymmetric_scales(least, most, kPanel, stripe.q_min, stripe.q_max, stripe.scale_dtype, found,
                        code);
    }
    for (int v = 0; v < kPanel; v += kLanes) {
      const F32 step = load(found + v, Full{}), offset = to_float(load_signed(code + v, Full{}));
      if (i == 0) {
        store(scale + v, step, Full{});
        store(zero + v, offset, Full{});
      }
      if (stripe.shrinks == 1) continue;
      const F32 best = load(error + v, Full{});
      const F32 less = min(rounding_error(stripe, values + v, step, offset), best);
      const Mask old = equal(bits(less), bits(best));
      const auto keep_if_old = [&](float* p, F32 x) {
        store(p, from_bits(select(old, bits(load(p, Full{})), bits(x))), Full{});
      };
      store(error + v, less, Full{});
      keep_if_old(scale + v, step);
      keep_if_old(zero + v, offset);
    }
  }
}

void fit_scale(const GptqStripe& stripe, const GptqPanel& panel) {
  fit_to(stripe, panel, panel.values + stripe.first * kPanel);
}

// The stripe's weights if none of them were rounded: each makes up for the columns before the
// stripe and for those in it that did so. `weights` are those at the beginning.
inline void settle(const GptqStripe& stripe, const GptqPanel& panel, const float* weights,
                   float* out) {
  const int64_t first = stripe.first, width = stripe.width, depth = first + width;
  const float* const values = panel.values + first * kPanel;
  for (int64_t i = 0; i < width * kPanel; i += kLanes) {
    store(out + i, load(values + i, Full{}) - load(weights + i, Full{}), Full{});
  }
  for (int64_t c = 0; c < width; c += kColumns) {
    const float* factor = stripe.factor + c * depth + first * kColumns;
    update(out, c, 0, c, factor);
    const int64_t end = width - c < kColumns ? width : c + kColumns;
    for (int64_t j = c; j < end; ++j) {
      for (int v = 0; v < kPanel; v += kLanes) {
        float* const column = out + j * kPanel + v;
        const F32 fell = broadcast(0.0f) - load(column, Full{});
        store(column, fell, Full{});
        for (int64_t i = j + 1; i < end; ++i) {
          float* const next = out + i * kPanel + v;
          store(next,
                multiply_add(fell, broadcast(factor[j * kColumns + i - c]), load(next, Full{})),
                Full{});
        }
      }
    }
  }
  for (int64_t i = 0; i < width * kPanel; i += kLanes) {
    store(out + i, load(weights + i, Full{}) - load(out + i, Full{}), Full{});
  }
}

// Rounds one column, whose weights were `weights` at the beginning, and lets the next `rest` ones
// make up for it; their shares are at `factor`.
QK_INLINE void round_column(const GptqStripe& stripe, const GptqPanel& panel, int64_t index,
                            int rest, const float* factor, const float* weights, int8_t* codes) {
  float* const column = panel.values + (stripe.first + index) * kPanel;
  const int64_t group = stripe.group[index] * kPanel;
  for (int v = 0; v < kPanel; v += kLanes) {
    const F32 w = load(column + v, Full{}), step = load(panel.scale + group + v, Full{});
    const F32 zero = load(panel.zero + group + v, Full{});
    const I32 code = code_of(stripe, w, step, zero);
    store_bytes(codes + v, code + round(zero), Full{});
    const F32 rounded = to_float(code) * step, fell = load(weights + v, Full{}) - rounded;
    store(column + v, fell, Full{});
    const F32 error = (rounded - w) * broadcast(stripe.diagonal[index]);
    store(panel.loss + v, load(panel.loss + v, Full{}) + broadcast(0.5f) * error * error, Full{});
    for (int j = 1; j <= rest; ++j) {
      float* const next = column + j * kPanel + v;
      store(next, multiply_add(fell, broadcast(factor[j]), load(next, Full{})), Full{});
    }
  }
}

void sweep_stripe(const GptqStripe& stripe, const GptqPanel& panel, int8_t* codes, float* weights) {
  const int64_t first = stripe.first, width = stripe.width, depth = first + width;
  std::memcpy(weights, panel.values + first * kPanel, sizeof(float) * width * kPanel);
  for (int64_t begin = 0; begin < first; begin += kDepth) {
    const int64_t end = begin + kDepth < first ? begin + kDepth : first;
    for (int64_t c = 0; c < width; c += kColumns) {
      update(panel.values, first + c, begin, end, stripe.factor + c * depth);
    }
  }
  if (stripe.fit) {
    float* const settled = weights + width * kPanel;
    settle(stripe, panel, weights, settled);
    fit_to(stripe, panel, settled);
  }
  for (int64_t c = 0; c < width; c += kColumns) {
    const float* factor = stripe.factor + c * depth;
    update(panel.values, first + c, first, first + c, factor);
    const int n = static_cast<int>(width - c < kColumns ? width - c : kColumns);
    for (int j = 0; j < n; ++j) {
      round_column(stripe, panel, c + j, n - 1 - j, factor + (first + c + j) * kColumns + j,
                   weights + (c + j) * kPanel, codes + (c + j) * kPanel);
    }
  }
  for (int64_t r = 0; r < panel.rows; ++r) {
    int8_t* const out = panel.codes + r * panel.code_stride + first;
    for (int64_t c = 0; c < width; ++c) out[c] = codes[c * kPanel + r];
  }
}

}  // namespace
}  // namespace qk::QK_ISA
