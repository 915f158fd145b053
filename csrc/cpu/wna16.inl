// The table of wna16.h for one ISA, which says how 16 channels' codes are decoded: FloatCodes here,
// PairCodes<bits> where it has PairWords.
#include "cpu/panel_gemm.inl"
#include "cpu/transpose.inl"
#include "cpu/wna16.h"

namespace qk::QK_ISA {
namespace {

// Where the i-th code of a word is.
constexpr int shift_of(int bits, int i) { return i % 2 * 16 + i / 2 * bits; }

#ifndef QK_FLOAT_CODES
template <int kBits>
struct FloatCodes {
  using Words = FloatWords;
  static constexpr int kStep = 32 / kBits;
  static constexpr bool kPlain = false;
  template <int i>
  QK_INLINE F32 at(I32 packed) const {
    if constexpr (kBits == 16) {
      return from_bits(i == 0 ? shift_left<16>(packed)
                              : packed & shift_left<16>(broadcast(0xffff)));
    }
    const I32 code = shift_right<shift_of(kBits, i)>(packed) & broadcast((1 << kBits) - 1);
    return to_float(code - broadcast(1 << (kBits - 1)));
  }
};
#endif

// bf16 scales of 16 channels' groups [0, 32), the other way round: pairs of groups are turned as
// words, then parted.
QK_INLINE void turn_pairs(const BFloat16* scale, int64_t groups, float* out) {
  alignas(64) float turned[kLanes][kLanes];
  transpose(reinterpret_cast<const float*>(scale), groups / 2, turned[0], kLanes);
  for (int64_t g = 0; g < kLanes; ++g, out += 2 * kPanelCols) {
    const I32 pair = bits(load(turned[g], Full{}));
    store(out, from_bits(shift_left<16>(pair)), Full{});
    store(out + kPanelCols, from_bits(pair & broadcast(static_cast<int>(0xffff0000u))), Full{});
  }
}

// scale and -zero point * scale of 16 channels' groups, the other way round: [count][kPanelCols].
template <class T>
void fill_scales(const Wna16Weight& weight, int64_t row, int64_t first, int64_t count, float* scale,
                 float* offset) {
  alignas(64) float block[kLanes][kLanes], zero[kLanes][kLanes];
  const int64_t rows = std::min<int64_t>(kLanes, weight.rows - row);
  int64_t g = 0;
  if constexpr (std::is_same_v<T, BFloat16>) {
    const bool pairs = !offset && rows == kLanes && weight.groups % 2 == 0 &&
                       reinterpret_cast<uintptr_t>(weight.scale) % sizeof(float) == 0;
    for (; pairs && g + 2 * kLanes <= count; g += 2 * kLanes) {
      turn_pairs(static_cast<const T*>(weight.scale) + row * weight.groups + first + g,
                 weight.groups, scale + g * kPanelCols);
    }
  }
  for (; g < count; g += kLanes) {
    const int64_t wide = std::min<int64_t>(kLanes, count - g);
    for (int64_t r = 0; r < kLanes; ++r) {
      const int64_t at = (row + std::min(r, rows - 1)) * weight.groups + first + g;
      const T* const p = static_cast<const T*>(weight.scale) + at;
      const F32 s = wide == kLanes ? load(p, Full{}) : load(p, Part(wide));
      store(block[r], s, Full{});
      if (offset) {
        const int8_t* const z = weight.zero_point + at;
        const I32 point = wide == kLanes ? load_signed(z, Full{}) : load_signed(z, Part(wide));
        store(zero[r], to_float(broadcast(0) - point) * s, Full{});
      }
    }
    if (wide == kLanes) {
      transpose(block[0], kLanes, scale + g * kPanelCols, kPanelCols);
      if (offset) transpose(zero[0], kLanes, offset + g * kPanelCols, kPanelCols);
    } else {
      for (int64_t i = 0; i < wide; ++i) {
        for (int64_t r = 0; r < kLanes; ++r) {
          scale[(g + i) * kPanelCols + r] = block[r][i];
          if (offset) offset[(g + i) * kPanelCols + r] = zero[r][i];
        }
      }
    }
  }
}

// The same of a panel whose scales lie so already.
template <class T>
void copy_scales(const Wna16Weight& weight, int64_t panel, int64_t first, int64_t count,
                 float* scale, float* offset) {
  const int64_t at = (panel * weight.groups + first) * kPanelCols;
  const T* const from = static_cast<const T*>(weight.scale) + at;
  for (int64_t i = 0; i < count * kPanelCols; i += kLanes) {
    const F32 s = load(from + i, Full{});
    store(scale + i, s, Full{});
    if (offset) {
      const I32 point = load_signed(weight.zero_point + at + i, Full{});
      store(offset + i, to_float(broadcast(0) - point) * s, Full{});
    }
  }
}

void fill_panel(const Wna16Weight& weight, int64_t panel, int64_t first, int64_t count,
                float* scale, float* offset) {
  if (weight.by_panels) {
    return visit_float(weight.scale_dtype, [&]<class T>(T) {
      copy_scales<T>(weight, panel, first, count, scale, offset);
    });
  }
  for (int64_t c = 0; c < kPanelCols && panel * kPanelCols + c < weight.rows; c += kLanes) {
    visit_float(weight.scale_dtype, [&]<class T>(T) {
      fill_scales<T>(weight, panel * kPanelCols + c, first, count, scale + c,
                     offset ? offset + c : nullptr);
    });
  }
}

// Asks for the values [rows][groups] of a panel's groups [first, first + count).
void fetch_rows(const Wna16Weight& weight, const void* values, int64_t bytes, int64_t panel,
                int64_t first, int64_t count) {
  const int64_t row = panel * kPanelCols, rows = std::min(kPanelCols, weight.rows - row);
  const char* p = static_cast<const char*>(values) + (row * weight.groups + first) * bytes;
  for (int64_t r = 0; r < rows; ++r, p += weight.groups * bytes) {
    __builtin_prefetch(p);
    __builtin_prefetch(p + count * bytes - 1);
  }
}

// Asks for what fill_panel will want after the groups up to `first`: a line of every row, far apart
// where rows are long, which the hardware does not fetch ahead.
void fetch_after(const Wna16Weight& weight, int64_t panel, int64_t first) {
  if (first == weight.groups) {
    first = 0;
    if (++panel * kPanelCols >= weight.rows) return;
  }
  const int64_t count = std::min(kDirectGroups, weight.groups - first);
  const int64_t bytes = weight.scale_dtype == DType::kFloat32 ? 4 : 2;
  fetch_rows(weight, weight.scale, bytes, panel, first, count);
  if (weight.zero_point) fetch_rows(weight, weight.zero_point, 1, panel, first, count);
}

// Groups of whole words.
template <bool kZero>
struct ScaledGroups {
  static constexpr bool kOffset = kZero, kInside = false, kRowScale = false;
  const Wna16Weight& weight;
  int64_t size;
  void fill(int64_t panel, int64_t first, int64_t count, float* scale, float* offset) const {
    fill_panel(weight, panel, first, count, scale, kZero ? offset : nullptr);
    if (!weight.by_panels) fetch_after(weight, panel, first + count);
  }
  // The scales that a panel later will be those of the groups from `first` on.
  template <class Words>
  void later(Slice<Words>& slice, int64_t panel, int64_t first) const {
    if (!weight.by_panels) return;
    slice.later_bytes = kPanelCols * (weight.scale_dtype == DType::kFloat32 ? 4 : 2);
    slice.later = static_cast<const char*>(weight.scale) +
                  ((panel + 1) * weight.groups + first) * slice.later_bytes;
  }
};

// Weights without scales.
struct PlainWeights {
  static constexpr bool kOffset = false, kInside = false, kRowScale = false;
  int64_t size;
  void fill(int64_t, int64_t, int64_t count, float* scale, float*) const {
    std::fill_n(scale, count * kPanelCols, 1.0f);
  }
};

// Groups that end inside a word: decoded weights are multiplied one by one.
struct ScaledWeights {
  static constexpr bool kOffset = false, kInside = true, kRowScale = false;
  const Wna16Weight& weight;
  int64_t size;
  void fill(int64_t, int64_t, int64_t count, float* scale, float*) const {
    for (int64_t i = 0; i < count * kPanelCols; ++i) scale[i] = 1.0f;
  }
  void apply(int64_t panel, int64_t k, int64_t count, float* decoded) const {
    alignas(64) float scale[kPanelCols], offset[kPanelCols];
    int64_t loaded = -1;
    for (int64_t i = 0; i < count && k + i < weight.cols; ++i, decoded += kPanelCols) {
      const int64_t g = (k + i) / weight.group;
      if (g != loaded) {
        fill_panel(weight, panel, g, 1, scale, weight.zero_point ? offset : nullptr);
        loaded = g;
      }
      for (int c = 0; c < kPanelCols; c += kLanes) {
        const F32 s = load(scale + c, Full{}), code = load(decoded + c, Full{});
        const F32 value =
            weight.zero_point ? multiply_add(code, s, load(offset + c, Full{})) : code * s;
        store(decoded + c, value, Full{});
      }
    }
  }
};

bool whole_words(const Wna16Weight& weight) {
  return weight.groups == 1 || weight.group % wna16_step(weight.bits) == 0;
}

bool takes_pairs(const Wna16Weight& weight, DType dtype) {
#ifdef QK_PAIRS
  return dtype == DType::kBFloat16 && whole_words(weight);
#else
  static_cast<void>(weight);
  static_cast<void>(dtype);
  return false;
#endif
}

int64_t depth(const Wna16Weight& weight, DType dtype) {
  const int64_t k = wna16_steps(weight.bits, weight.cols) * wna16_step(weight.bits);
  return takes_pairs(weight, dtype) ? k / 2 : k;
}

#ifdef QK_PAIRS
// The sums of tile `t` over the groups.
void sum_tile(const RowsInput& input, const PackedRows& x, int64_t t, float* row) {
  for (int64_t r = x.first_row(t); r < x.first_row(t + 1); ++r) {
    read_row<BFloat16>(input, r, row);
    for (int64_t g = 0; g < x.groups; ++g) {
      const int64_t k = g * x.group;
      x.sums[r * x.groups + g] = sum_of(row + k, std::min(x.group, input.cols - k));
    }
  }
}

// Tile `t` of bf16 rows whose columns are in order: their pairs are the words as they are.
void pack_pairs(const RowsInput& input, const PackedRows& x, int64_t t) {
  const int64_t first = x.first_row(t), rows = x.first_row(t + 1) - first;
  int32_t* to = static_cast<int32_t*>(x.words) + first * x.depth;
  const int32_t* const end = to + rows * x.depth;
  const uint16_t* from[kTileRows];
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = input.order ? input.order[first + r] : first + r;
    from[r] = static_cast<const uint16_t*>(input.x) + at * input.stride;
  }
  if (rows == 1) {
    std::memcpy(to, from[0], input.cols * sizeof(uint16_t));
    std::memset(reinterpret_cast<uint16_t*>(to) + input.cols, 0,
                (2 * x.depth - input.cols) * sizeof(uint16_t));
    return;
  }
  alignas(64) float block[kLanes][kLanes] = {}, turned[kLanes][kLanes];
  for (int64_t d = 0; d < x.depth; d += kLanes) {
    const int64_t cols = std::min<int64_t>(2 * kLanes, input.cols - 2 * d);
    for (int64_t r = 0; r < rows; ++r) {
      if (cols == 2 * kLanes) {
        std::memcpy(block[r], from[r] + 2 * d, sizeof(block[r]));
      } else {
        std::memset(block[r], 0, sizeof(block[r]));
        if (cols > 0) std::memcpy(block[r], from[r] + 2 * d, cols * sizeof(uint16_t));
      }
    }
    transpose(block[0], kLanes, turned[0], kLanes);
    // What a vector has beyond the tile's rows is overwritten by the words that follow.
    for (int64_t i = 0; i < std::min<int64_t>(kLanes, x.depth - d); ++i, to += rows) {
      if (to + kLanes <= end) {
        std::memcpy(to, turned[i], sizeof(turned[i]));
      } else {
        std::memcpy(to, turned[i], rows * sizeof(int32_t));
      }
    }
  }
}
#endif

void pack_x(const Wna16Weight& weight, const RowsInput& input, const PackedRows& x, int64_t t,
            float* row) {
#ifdef QK_PAIRS
  if (takes_pairs(weight, input.dtype) && !input.perm) {
    pack_pairs(input, x, t);
    if (x.sums) sum_tile(input, x, t, row);
    return;
  }
  if (takes_pairs(weight, input.dtype)) return pack_tile<PairWords>(input, x, t, row);
#endif
  static_cast<void>(weight);
  pack_tile<FloatWords>(input, x, t, row);
}

template <int kBits>
void gemm_bits(const Wna16Weight& weight, DType dtype, const PackedRows& x, int64_t panel,
               int64_t first_tile, int64_t end_tile, const PanelOutput& out) {
  const int32_t* const packed =
      weight.packed + panel * wna16_steps(kBits, weight.cols) * kPanelCols;
  const auto run = [&](auto decoder) {
    const auto with = [&](const auto& groups) {
      panel_gemm(decoder, groups, x, packed, panel, first_tile, end_tile, out);
    };
    const int64_t size = weight.groups == 1 ? INT64_MAX : weight.group;
    if (weight.zero_point) return with(ScaledGroups<true>{weight, size});
    with(ScaledGroups<false>{weight, size});
  };
#ifdef QK_PAIRS
  if (takes_pairs(weight, dtype)) return run(PairCodes<kBits>{});
#endif
  static_cast<void>(dtype);
  if (whole_words(weight)) return run(FloatCodes<kBits>{});
  panel_gemm(FloatCodes<kBits>{}, ScaledWeights{weight, INT64_MAX}, x, packed, panel, first_tile,
             end_tile, out);
}

void gemm(const Wna16Weight& weight, DType dtype, const PackedRows& x, int64_t panel,
          int64_t first_tile, int64_t end_tile, const PanelOutput& out) {
  if (weight.bits == 16) {
    const int32_t* const packed = weight.packed + panel * wna16_steps(16, weight.cols) * kPanelCols;
    const PlainWeights groups = {INT64_MAX};
#ifdef QK_PAIRS
    if (takes_pairs(weight, dtype)) {
      return panel_gemm(PairCodes<16>{}, groups, x, packed, panel, first_tile, end_tile, out);
    }
#endif
    panel_gemm(FloatCodes<16>{}, groups, x, packed, panel, first_tile, end_tile, out);
  } else if (weight.bits == 4) {
    gemm_bits<4>(weight, dtype, x, panel, first_tile, end_tile, out);
  } else {
    gemm_bits<8>(weight, dtype, x, panel, first_tile, end_tile, out);
  }
}

// ---- weights ----

// Codes in a row as they are stored -> even ones below, odd ones above.
QK_INLINE I32 part_codes(I32 word, int bits) {
  const I32 byte = broadcast(0xff);
  if (bits == 4) {
    const auto squeeze = [&](I32 nibbles) {
      nibbles = (nibbles | shift_right<4>(nibbles)) & broadcast(0x00ff00ff);
      return (nibbles | shift_right<8>(nibbles)) & broadcast(0xffff);
    };
    const I32 even = squeeze(word & broadcast(0x0f0f0f0f));
    return even | shift_left<16>(squeeze(shift_right<4>(word) & broadcast(0x0f0f0f0f)));
  }
  const I32 odd = shift_left<8>(word & broadcast(0xff00)) | (word & shift_left<24>(byte));
  return (word & byte) | (shift_right<8>(word) & shift_left<8>(byte)) | odd;
}

// The packed words of a row.
void part_row(const Wna16Words& in, int64_t r, int32_t* out) {
  if (in.bits == 16) {
    const uint16_t* const row = static_cast<const uint16_t*>(in.words) + r * in.stride;
    if (in.cols % 2) out[in.cols / 2] = row[in.cols - 1];
    std::memcpy(out, row, in.cols / 2 * sizeof(int32_t));
    return;
  }
  const int32_t* const row = static_cast<const int32_t*>(in.words) + r * in.stride;
  const int64_t steps = wna16_steps(in.bits, in.cols), step = wna16_step(in.bits);
  if (in.perm) {
    const uint32_t mask = (1u << in.bits) - 1;
    for (int64_t s = 0; s < steps; ++s) {
      uint32_t word = 0;
      for (int64_t i = 0; i < step && s * step + i < in.cols; ++i) {
        const int64_t k = in.perm[s * step + i];
        const uint32_t code = static_cast<uint32_t>(row[k / step]) >> (k % step * in.bits) & mask;
        word |= code << shift_of(in.bits, static_cast<int>(i));
      }
      out[s] = static_cast<int32_t>(word);
    }
    return;
  }
  const auto part = [&](const int32_t* words, int64_t s, auto lanes) {
    const I32 word = bits(load(reinterpret_cast<const float*>(words), lanes));
    store(reinterpret_cast<float*>(out + s), from_bits(part_codes(word, in.bits)), lanes);
  };
  for_lanes(steps, [&](int64_t s, auto lanes) { part(row + s, s, lanes); });
  if (in.cols % step) {  // beyond the last column there may be anything
    const int32_t kept = row[steps - 1] & ((1 << (in.cols % step * in.bits)) - 1);
    part(&kept, steps - 1, Part(1));
  }
}

void pack(const Wna16Words& in, int64_t panel, int32_t* room, int32_t* packed) {
  const int64_t steps = wna16_steps(in.bits, in.cols);
  for (int64_t c = 0; c < kPanelCols; c += kLanes) {
    for (int64_t r = 0; r < kLanes; ++r) {
      const int64_t row = panel * kPanelCols + c + r;
      if (row < in.rows) {
        part_row(in, row, room + r * steps);
      } else {
        std::fill_n(room + r * steps, steps, 0);
      }
    }
    const auto* const from = reinterpret_cast<const float*>(room);
    int64_t s = 0;
    for (; s + kLanes <= steps; s += kLanes) {
      transpose(from + s, steps, reinterpret_cast<float*>(packed + s * kPanelCols + c), kPanelCols);
    }
    for (; s < steps; ++s) {
      for (int64_t r = 0; r < kLanes; ++r) packed[s * kPanelCols + c + r] = room[r * steps + s];
    }
  }
}

}  // namespace

extern const Wna16Kernels wna16;
const Wna16Kernels wna16 = {kTileRows, depth, pack_x, gemm, pack};

}  // namespace qk::QK_ISA
