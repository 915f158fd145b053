// See gptq.h. An ISA's file says how many vectors of rows and how many columns a tile in registers
// has: kVectors, kColumns.
#pragma once

#include "cpu/gptq.h"
#include "cpu/scale_impl.h"
#include "cpu/transpose.inl"

namespace qk::QK_ISA {
namespace {

constexpr int kPanel = kVectors * kLanes;
constexpr int64_t kDepth = 128;  // so many words of a panel stay in the L1 cache

// The words that a tile takes: one number each, or, where the ISA has units for it, a pair of bf16
// numbers of an even column and the one after it. As bits, words are kept among the numbers.
struct FloatWords {
  static QK_INLINE F32 add(F32 sum, F32 a, F32 b) { return multiply_add(a, b, sum); }
};
#ifndef QK_PAIRS
using PairWords = FloatWords;  // never used
constexpr bool kPairs = false;
#else
constexpr bool kPairs = true;
#endif

QK_INLINE I32 rounded_to_bf16(F32 x) {
  const I32 b = bits(x);
  const I32 rounded = b + (shift_right<16>(b) & broadcast(1)) + broadcast(0x7fff);
  return select(is_nan(x), broadcast(0x7fc00000), rounded);
}
QK_INLINE F32 pair_of(F32 even, F32 odd) {
  const I32 low = shift_right<16>(rounded_to_bf16(even));
  return from_bits(low | (rounded_to_bf16(odd) & broadcast(-65536)));
}

bool load_rows(const float* w, int64_t stride, int64_t cols, int64_t rows, float* values) {
  F32 residue = broadcast(0.0f);  // x - x is zero unless x is infinite or NaN
  for (int64_t c = 0; c < cols; c += kLanes) {
    const int64_t n = cols - c < kLanes ? cols - c : kLanes;
    for (int64_t v = 0; v < kPanel; v += kLanes) {
      float* const out = values + c * kPanel + v;
      if (n == kLanes && rows - v >= kLanes) {
        transpose(w + v * stride + c, stride, out, kPanel);
      } else {
        for (int64_t r = 0; r < kLanes; ++r) {
          for (int64_t i = 0; i < n; ++i) {
            out[i * kPanel + r] = v + r < rows ? w[(v + r) * stride + c + i] : 0.0f;
          }
        }
      }
      for (int64_t i = 0; i < n; ++i) {
        const F32 x = load(out + i * kPanel, Full{});
        residue = residue + (x - x);
      }
    }
  }
  float left[kLanes], sum = 0.0f;
  store(left, residue, Full{});
  for (float x : left) sum += x;
  return sum == 0.0f;
}

void pack_factor(const GptqPack& p, int64_t begin, int64_t end, float* packed) {
  for (int64_t c = 0; c < p.width; c += kColumns) {
    const Part lanes(p.width - c < kColumns ? p.width - c : kColumns), all(kColumns);
    float diagonal[kLanes];
    store(diagonal, broadcast(1.0f), Full{});
    store(diagonal, load(p.diagonal + c, lanes), lanes);
    const F32 over = load(diagonal, Full{});
    const auto row = [&](int64_t k) {
      return load(p.factor + k * p.stride + p.first + c, lanes) / over;
    };
    float* const out = packed + c * (p.first + p.width);
    int64_t k = begin;
    for (; k < end && k < p.far; k += 2) {
      store(out + k / 2 * kColumns, pair_of(row(k), row(k + 1)), all);
    }
    for (; k < end; ++k) store(out + k * kColumns, row(k), all);
  }
}

// The columns of a tile, in registers.
struct Tile {
  F32 column[kColumns][kVectors];
};

// start[j] + sum of fell[k] * factor[k][j], k in [begin, end), in words: `fell` is by how much
// weights fell.
template <class Words>
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
        tile.column[j][v] = Words::add(tile.column[j][v], by[v], share);
      }
    }
  }
  return tile;
}

// values[column + j] make up for the words values[k], k in [begin, end), by how much weights fell.
template <class Words>
QK_INLINE void update(float* values, int64_t column, int64_t begin, int64_t end,
                      const float* factor) {
  float* const out = values + column * kPanel;
  const Tile tile = made_up<Words>(out, values, begin, end, factor);
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
    Tile tile = made_up<FloatWords>(values + c * kPanel, fell, 0, c, factor);
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
  std::memset(out + width * kPanel, 0, sizeof(float) * kColumns * kPanel);  // tiles reach over
  for (int64_t c = 0; c < width; c += kColumns) {
    const float* factor = stripe.factor + c * depth + first * kColumns;
    update<FloatWords>(out, c, 0, c, factor);
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

// Rounds the columns of a tile one after the other, and lets those after each make up for it.
// `weights` are theirs at the beginning.
QK_INLINE void round_tile(const GptqStripe& stripe, const GptqPanel& panel, int64_t begin,
                          const float* factor, const float* weights, int8_t* codes) {
  const int64_t first = stripe.first;
  Tile tile = made_up<FloatWords>(panel.values + (first + begin) * kPanel, panel.values, first,
                                  first + begin, factor);
#pragma GCC unroll 16
  for (int j = 0; j < kColumns; ++j) {
    const int64_t c = begin + j;
    if (c >= stripe.width) break;
    const float* const share = factor + (first + c) * kColumns;
    const float* const scale = panel.scale + stripe.group[c] * kPanel;
    const float* const zero = panel.zero + stripe.group[c] * kPanel;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int at = v * kLanes;
      const F32 w = tile.column[j][v], step = load(scale + at, Full{});
      const F32 offset = load(zero + at, Full{});
      const I32 code = code_of(stripe, w, step, offset);
      store_bytes(codes + c * kPanel + at, code + round(offset), Full{});
      const F32 rounded = to_float(code) * step;
      const F32 fell = load(weights + c * kPanel + at, Full{}) - rounded;
      store(panel.values + (first + c) * kPanel + at, fell, Full{});
      const F32 error = (rounded - w) * broadcast(stripe.diagonal[c]);
      float* const loss = panel.loss + at;
      store(loss, load(loss, Full{}) + broadcast(0.5f) * error * error, Full{});
#pragma GCC unroll 16
      for (int i = j + 1; i < kColumns; ++i) {
        tile.column[i][v] = multiply_add(fell, broadcast(share[i]), tile.column[i][v]);
      }
    }
  }
}

// Columns [stripe.far, end), an even number, become words, which are behind one another from the
// panel's first number on: never beyond what they are made of.
inline void keep_pairs(const GptqStripe& stripe, const GptqPanel& panel, int64_t end) {
  for (int64_t c = stripe.far; c + 1 < end; c += 2) {
    for (int v = 0; v < kPanel; v += kLanes) {
      const float* const p = panel.values + c * kPanel + v;
      store(panel.values + c / 2 * kPanel + v, pair_of(load(p, Full{}), load(p + kPanel, Full{})),
            Full{});
    }
  }
}

// Row by row, four columns in a word.
inline void store_codes(const GptqStripe& stripe, const GptqPanel& panel, const int8_t* codes) {
  int8_t* const out = panel.codes + stripe.first;
  int64_t c = 0;
  for (; c + 4 <= stripe.width; c += 4) {
    float words[kPanel];
    for (int v = 0; v < kPanel; v += kLanes) {
      const auto column = [&](int i) {
        return load_signed(codes + (c + i) * kPanel + v, Full{}) & broadcast(0xff);
      };
      const I32 low = column(0) | shift_left<8>(column(1));
      const I32 high = column(2) | shift_left<8>(column(3));
      store(words + v, from_bits(low | shift_left<16>(high)), Full{});
    }
    for (int64_t r = 0; r < panel.rows; ++r) {
      std::memcpy(out + r * panel.code_stride + c, words + r, sizeof(float));
    }
  }
  for (; c < stripe.width; ++c) {
    for (int64_t r = 0; r < panel.rows; ++r) out[r * panel.code_stride + c] = codes[c * kPanel + r];
  }
}

void sweep_stripe(const GptqStripe& stripe, const GptqPanel& panel, int8_t* codes, float* weights) {
  const int64_t first = stripe.first, width = stripe.width, depth = first + width;
  std::memcpy(weights, panel.values + first * kPanel, sizeof(float) * width * kPanel);
  const auto make_up = [&]<class Words>(Words, int64_t from, int64_t to) {
    for (int64_t begin = from; begin < to; begin += kDepth) {
      const int64_t end = begin + kDepth < to ? begin + kDepth : to;
      for (int64_t c = 0; c < width; c += kColumns) {
        update<Words>(panel.values, first + c, begin, end, stripe.factor + c * depth);
      }
    }
  };
  if constexpr (kPairs) make_up(PairWords{}, 0, stripe.far / 2);
  make_up(FloatWords{}, stripe.far, first);
  if (stripe.fit) {
    float* const settled = weights + width * kPanel;
    settle(stripe, panel, weights, settled);
    fit_to(stripe, panel, settled, settled + (width + kColumns) * kPanel);
  }
  for (int64_t c = 0; c < width; c += kColumns) {
    round_tile(stripe, panel, c, stripe.factor + c * depth, weights, codes);
  }
  store_codes(stripe, panel, codes);
  if (kPairs && stripe.pairs) keep_pairs(stripe, panel, depth);
}

}  // namespace
}  // namespace qk::QK_ISA
