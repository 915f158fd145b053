// See gptq.h, and gptq_pack_impl.h for what is packed.
#pragma once

#include "cpu/gptq_pack_impl.h"
#include "cpu/scale_impl.h"

namespace qk::QK_ISA {
namespace {

// The columns of a tile, in registers.
struct Tile {
  F32 column[kColumns][kVectors];
};

// start[j] + sum of fell[k] * factor[k][j], k in [0, depth), in words: `fell` is by how much
// weights fell.
template <class Words>
QK_INLINE Tile made_up(const float* start, const float* fell, int64_t depth, const float* factor) {
  Tile tile;
#pragma GCC unroll 16
  for (int j = 0; j < kColumns; ++j) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      tile.column[j][v] = load(start + j * kPanel + v * kLanes, Full{});
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
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

// The columns of a tile make up for `depth` words, by how much weights fell.
template <class Words>
QK_INLINE void update(float* columns, const float* fell, int64_t depth, const float* factor) {
  const Tile tile = made_up<Words>(columns, fell, depth, factor);
#pragma GCC unroll 16
  for (int j = 0; j < kColumns; ++j) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      store(columns + j * kPanel + v * kLanes, tile.column[j][v], Full{});
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
// `fell` has room for it, in words.
template <class Words>
void errors_in_turn(const GptqStripe& stripe, const float* values, const float* scale,
                    const float* zero, float* fell, float* errors) {
  constexpr int64_t kOf = Words::kNumbers;
  const int64_t width = stripe.width;
  F32 sum[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) sum[v] = broadcast(0.0f);
  for (int64_t c = 0; c < width; c += kColumns) {
    const float* const own = own_rows(stripe, c);
    const float* const far = kOf == 1 ? own : own + width * kColumns;
    Tile tile = made_up<Words>(values + c * kPanel, fell, c / kOf, far);
    F32 even[kVectors];
#pragma GCC unroll 16
    for (int j = 0; j < kColumns; ++j) {
      if (c + j >= width) break;
      const float* const share = own + (c + j) * kColumns;
      const F32 diagonal = broadcast(stripe.diagonal[c + j]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Trial trial(stripe, load(scale + v * kLanes, Full{}),
                          load(zero + v * kLanes, Full{}));
        const F32 w = tile.column[j][v], rounded = trial.rounded(w);
        const F32 error = (rounded - w) * diagonal;
        const F32 by = load(values + (c + j) * kPanel + v * kLanes, Full{}) - rounded;
        sum[v] = sum[v] + error * error;
        if (j % kOf == kOf - 1) {
          store(fell + (c + j) / kOf * kPanel + v * kLanes, Words::word(even[v], by), Full{});
        }
        even[v] = by;
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
    if (fell && stripe.own > stripe.width) {
      errors_in_turn<PairWords>(stripe, values, found, offset, fell, error);
    } else if (fell) {
      errors_in_turn<FloatWords>(stripe, values, found, offset, fell, error);
    }
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
  const int64_t width = stripe.width;
  const float* const values = panel.values + stripe.first * kPanel;
  for (int64_t i = 0; i < width * kPanel; i += kLanes) {
    store(out + i, load(values + i, Full{}) - load(weights + i, Full{}), Full{});
  }
  std::memset(out + width * kPanel, 0, sizeof(float) * kColumns * kPanel);  // tiles reach over
  for (int64_t c = 0; c < width; c += kColumns) {
    const float* const factor = own_rows(stripe, c);
    update<FloatWords>(out + c * kPanel, out, c, factor);
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

// The value of e2m1 that is nearest to x; the sum has the same unit in the last place (see encode).
QK_INLINE F32 nearest_float4(F32 x) {
  const F32 size = min(broadcast(Float4E2M1::kMax), magnitude(x));
  const I32 exponent = max(bits(size) & broadcast(0x7f800000), broadcast(127 << 23));
  const F32 magic = from_bits(exponent + broadcast(22 << 23));
  return from_bits(bits((size + magic) - magic) | (bits(x) & broadcast(INT32_MIN)));
}

// The code of a number, and what it stands for in steps of the scale.
struct Rounded {
  I32 code;
  F32 value;
};

template <class Grid>
QK_INLINE Rounded round_on(Grid, const GptqStripe& stripe, F32 w, F32 step, F32 offset) {
  if constexpr (std::is_same_v<Grid, int8_t>) {
    const I32 code = code_of(stripe, w, step, offset);
    return {code + round(offset), to_float(code)};
  } else if constexpr (std::is_same_v<Grid, Float8E4M3>) {
    const I32 code = encode<Grid, false>(w * (broadcast(1.0f) / step), Grid{});
    return {code, decode(code, Grid{})};
  } else {
    const F32 value = nearest_float4(w * (broadcast(1.0f) / step));
    return {encode<Float8E4M3, true>(value, Float8E4M3{}), value};
  }
}

// Rounds the columns of a tile one after the other, and lets those after each make up for it.
// `weights` are theirs at the beginning.
template <class Grid>
QK_INLINE void round_tile(Grid grid, const GptqStripe& stripe, const GptqPanel& panel,
                          int64_t begin, const float* weights, uint8_t* codes) {
  const float* const factor = own_rows(stripe, begin);
  float* const values = panel.values + stripe.first * kPanel;
  Tile tile = made_up<FloatWords>(values + begin * kPanel, values, begin, factor);
#pragma GCC unroll 16
  for (int j = 0; j < kColumns; ++j) {
    const int64_t c = begin + j;
    if (c >= stripe.width) break;
    const float* const share = factor + c * kColumns;
    const float* const scale = panel.scale + stripe.group[c] * kPanel;
    const float* const zero = panel.zero + stripe.group[c] * kPanel;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int at = v * kLanes;
      const F32 w = tile.column[j][v], step = load(scale + at, Full{});
      const F32 offset = load(zero + at, Full{});
      const Rounded found = round_on(grid, stripe, w, step, offset);
      store_bytes(codes + c * kPanel + at, found.code, Full{});
      const F32 rounded = found.value * step;
      const F32 fell = load(weights + c * kPanel + at, Full{}) - rounded;
      store(values + c * kPanel + at, fell, Full{});
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

// Columns [stripe.far, end), of an even number, become words, which are behind one another from the
// panel's first number on: never beyond what they are made of.
inline void keep_pairs(const GptqStripe& stripe, const GptqPanel& panel, int64_t end) {
  for (int64_t c = stripe.far; c + 1 < end; c += 2) {
    for (int v = 0; v < kPanel; v += kLanes) {
      const float* const p = panel.values + c * kPanel + v;
      store(panel.values + c / 2 * kPanel + v,
            PairWords::word(load(p, Full{}), load(p + kPanel, Full{})), Full{});
    }
  }
}

// Four columns in a word, and so many words of each row at once: rows are far apart.
inline void store_codes(const GptqStripe& stripe, const GptqPanel& panel, const int8_t* codes) {
  constexpr int64_t kAtOnce = 4 * kLanes;
  for (int64_t begin = 0; begin < stripe.width; begin += kAtOnce) {
    const int64_t count = stripe.width - begin < kAtOnce ? stripe.width - begin : kAtOnce;
    for (int64_t v = 0; v < kPanel && v < panel.rows; v += kLanes) {
      alignas(64) float words[kLanes * kLanes], turned[kLanes * kLanes];
      for (int64_t c = 0; c < count; c += 4) {
        const auto column = [&](int i) {
          if (c + i >= count) return broadcast(0);
          return load_signed(codes + (begin + c + i) * kPanel + v, Full{}) & broadcast(0xff);
        };
        const I32 low = column(0) | shift_left<8>(column(1));
        const I32 high = column(2) | shift_left<8>(column(3));
        store(words + c / 4 * kLanes, from_bits(low | shift_left<16>(high)), Full{});
      }
      for (int64_t c = (count + 3) / 4; c < kLanes; ++c) {
        store(words + c * kLanes, broadcast(0.0f), Full{});
      }
      transpose(words, kLanes, turned, kLanes);
      const int64_t rows = panel.rows - v < kLanes ? panel.rows - v : kLanes;
      int8_t* const out = panel.codes + v * panel.code_stride + stripe.first + begin;
      for (int64_t r = 0; r < rows; ++r) {
        const float* const row = turned + r * kLanes;
        if (count == kAtOnce) {
          std::memcpy(out + r * panel.code_stride, row, kAtOnce);
        } else {
          std::memcpy(out + r * panel.code_stride, row, count);
        }
      }
    }
  }
}

void make_up(const GptqStripe& stripe, const GptqPanel& panel, int64_t begin, int64_t end) {
  const int64_t far = stripe.far / 2, pairs = far < begin ? begin : far < end ? far : end;
  for (int64_t c = 0; c < stripe.width; c += kColumns) {
    float* const columns = panel.values + (stripe.first + c) * kPanel;
    const float* const factor = stripe.factor + block_place(stripe, begin, end, c);
    if (kPairs && begin < pairs) {
      update<PairWords>(columns, panel.values + begin * kPanel, pairs - begin, factor);
    }
    if (pairs < end) {
      update<FloatWords>(columns, panel.values + (far + pairs) * kPanel, end - pairs,
                         factor + (pairs - begin) * kColumns);
    }
  }
}

void sweep_stripe(const GptqStripe& stripe, const GptqPanel& panel, const float* weights,
                  int8_t* codes, float* scratch) {
  if (stripe.fit) {
    settle(stripe, panel, weights, scratch);
    fit_to(stripe, panel, scratch, scratch + (stripe.width + kColumns) * kPanel);
  }
  const auto round_tiles = [&](auto grid) {
    for (int64_t c = 0; c < stripe.width; c += kColumns) {
      round_tile(grid, stripe, panel, c, weights, reinterpret_cast<uint8_t*>(codes));
    }
  };
  if (stripe.float_bits == 0) {
    round_tiles(int8_t{});
  } else if (stripe.float_bits == 8) {
    round_tiles(Float8E4M3{});
  } else {
    round_tiles(Float4E2M1{});
  }
  store_codes(stripe, panel, codes);
  if (kPairs && stripe.pairs) keep_pairs(stripe, panel, stripe.first + stripe.width);
}

}  // namespace
}  // namespace qk::QK_ISA
