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

// The columns of a tile, in registers.
struct Tile {
  F32 column[kColumns][kVectors];
};

// start[j] + sum of fell[k] * factor[k][j], k in [begin, end): `fell` is by how much weights fell.
QK_INLINE Tile made_up(const float* start, const float* fell, int64_t begin, int64_t end,
                       const float* factor) {
  Tile tile;
#pragma GCC unroll 16
  for (int j = 0; j < kColumns; ++j) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      tile.column[j][v] = load(start + j * kPanel + v * kLanes, Full{});
    }
  }
  for (int64_t k = begin; k < end; ++k) {
    F32 by[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) by[v] = load(fell + k * kPanel + v * kLanes, Full{});
#pragma GCC unroll 16
    for (int j = 0; j < kColumns; ++j) {
      const F32 share = broadcast(factor[k * kColumns + j]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        tile.column[j][v] = multiply_add(by[v], share, tile.column[j][v]);
      }
    }
  }
  return tile;
}

// values[column + j] make up for values[k], k in [begin, end), which are by how much weights fell.
QK_INLINE void update(float* values, int64_t column, int64_t begin, int64_t end,
                      const float* factor) {
  float* const out = values + column * kPanel;
  const Tile tile = made_up(out, values, begin, end, factor);
#pragma GCC unroll 16
  for (int j = 0; j < kColumns; ++j) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      store(out + j * kPanel + v * kLanes, tile.column[j][v], Full{});
    }
  }
}

// The numbers w by `scale` and `zero`, as codes less the zero point.
QK_INLINE I32 code_of(const GptqStripe& stripe, F32 w, F32 scale, F32 zero) {
  const F32 low = broadcast(static_cast<float>(stripe.q_min));
  const F32 high = broadcast(static_cast<float>(stripe.q_max));
  return round(max(low - zero, min(high - zero, w * (broadcast(1.0f) / scale))));
}

// A scale that rows try, and how it divides.
struct Trial {
  F32 scale, inverse, low, high;

  QK_INLINE Trial(const GptqStripe& stripe, F32 step, F32 zero)
      : scale(step),
        inverse(broadcast(1.0f) / step),
        low(broadcast(static_cast<float>(stripe.q_min)) - zero),
        high(broadcast(static_cast<float>(stripe.q_max)) - zero) {}
  QK_INLINE F32 rounded(F32 w) const {
    return to_float(round(max(low, min(high, w * inverse)))) * scale;
  }
};

// Per row, the sum over the stripe's columns of ((q - w) * the factor's diagonal)^2, each column
// rounded alone.
QK_INLINE F32 error_alone(const GptqStripe& stripe, const float* values, const Trial& trial) {
  F32 sum = broadcast(0.0f);
  for (int64_t c = 0; c < stripe.width; ++c) {
    const F32 w = load(values + c * kPanel, Full{});
    const F32 error = (trial.rounded(w) - w) * broadcast(stripe.diagonal[c]);
    sum = sum + error * error;
  }
  return sum;
}

// The same when each column makes up for those before it: a sweep of the stripe, for its loss only.
// `fell` has room for it.
inline void errors_in_turn(const GptqStripe& stripe, const float* values, const float* scale,
                           const float* zero, float* fell, float* errors) {
  const int64_t first = stripe.first, width = stripe.width, depth = first + width;
  F32 sum[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) sum[v] = broadcast(0.0f);
  for (int64_t c = 0; c < width; c += kColumns) {
    const float* const factor = stripe.factor + c * depth + first * kColumns;
    Tile tile = made_up(values + c * kPanel, fell, 0, c, factor);
#pragma GCC unroll 16
    for (int j = 0; j < kColumns; ++j) {
      if (c + j >= width) break;
      const float* const share = factor + (c + j) * kColumns;
      const F32 diagonal = broadcast(stripe.diagonal[c + j]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const int64_t place = (c + j) * kPanel + v * kLanes;
        const Trial trial(stripe, load(scale + v * kLanes, Full{}),
                          load(zero + v * kLanes, Full{}));
        const F32 w = tile.column[j][v], rounded = trial.rounded(w);
        const F32 error = (rounded - w) * diagonal, by = load(values + place, Full{}) - rounded;
        sum[v] = sum[v] + error * error;
        store(fell + place, by, Full{});
#pragma GCC unroll 16
        for (int i = j + 1; i < kColumns; ++i) {
          tile.column[i][v] = multiply_add(by, broadcast(share[i]), tile.column[i][v]);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) store(errors + v * kLanes, sum[v], Full{});
}

// The scale of the stripe from `values`, its weights as they are now. Candidates are swept if there
// is room for it in `fell`, which may be null.
inline void fit_to(const GptqStripe& stripe, const GptqPanel& panel, const float* values,
                   float* fell) {
  float low[kPanel], high[kPanel], least[kPanel], most[kPanel];
  float found[kPanel], offset[kPanel], error[kPanel], best[kPanel];
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
    store(best + v, from_bits(broadcast(0x7f800000)), Full{});
  }
  float* const scale = panel.scale + stripe.group[0] * kPanel;
  float* const zero = panel.zero + stripe.group[0] * kPanel;
  const int candidates = stripe.signs ? 2 * stripe.shrinks : stripe.shrinks;
  for (int i = 0; i < candidates; ++i) {
    const float shrink = stripe.shrink[i % stripe.shrinks];
    int8_t code[kPanel] = {};
    for (int r = 0; r < kPanel; ++r) {
      least[r] = low[r] * shrink;
      most[r] = high[r] * shrink;
    }
    if (stripe.symmetric) {
      symmetric_scales(most, kPanel, stripe.divisor, stripe.scale_dtype, found);
    } else {
      asymmetric_scales(least, most, kPanel, stripe.q_min, stripe.q_max, stripe.scale_dtype, found,
                        code);
    }
    for (int r = 0; r < kPanel; ++r) {
      if (i >= stripe.shrinks) found[r] = -found[r];
      offset[r] = code[r];
    }
    if (i == 0) {
      std::memcpy(scale, found, sizeof(found));
      std::memcpy(zero, offset, sizeof(offset));
      if (candidates == 1) return;
    }
    if (fell) errors_in_turn(stripe, values, found, offset, fell, error);
    for (int v = 0; v < kPanel; v += kLanes) {
      const F32 step = load(found + v, Full{}), shift = load(offset + v, Full{});
      const F32 made = fell ? load(error + v, Full{})
                            : error_alone(stripe, values + v, Trial(stripe, step, shift));
      const F32 before = load(best + v, Full{}), less = min(made, before);
      const Mask old = equal(bits(less), bits(before));
      const auto keep_if_old = [&](float* p, F32 x) {
        store(p, from_bits(select(old, bits(load(p, Full{})), bits(x))), Full{});
      };
      store(best + v, less, Full{});
      keep_if_old(scale + v, step);
      keep_if_old(zero + v, shift);
    }
  }
}

void fit_scale(const GptqStripe& stripe, const GptqPanel& panel) {
  fit_to(stripe, panel, panel.values + stripe.first * kPanel, nullptr);
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
    fit_to(stripe, panel, settled, settled + (width + kColumns) * kPanel);
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
