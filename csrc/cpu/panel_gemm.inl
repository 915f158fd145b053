// See panel_gemm.h. An ISA's file says before what a tile in registers is: kTileRows rows of
// kTileVectors vectors of 16 columns, a divisor of a panel's four.
//
// A Decoder makes vectors of a word type (FloatWords here, PairWords where the ISA has them) from
// 16 channels' packed words:
//   using Words; static constexpr int kStep;        k of a packed word
//   template <int i> Words::Vector at(I32 packed)   its vector i of kStep / Words::kCount
//   static constexpr bool kPlain                    packed words are the vectors: nothing to decode
// `Groups` says what multiplies the sums over a group of k:
//   int64_t size                                    k of a group: a multiple of kStep, or all of K
//   static constexpr bool kOffset                   whether there is an offset: + x's sum * offset
//   static constexpr bool kRowScale                 x's `sums` are scales of its groups: * that
//   static constexpr bool kInside                   decoded words are multiplied instead, by
//   void apply(int64_t panel, int64_t k, int64_t count, float* decoded)
//   void fill(int64_t panel, int64_t first, int64_t count, float* scale, float* offset)
//                                                   [count][kPanelCols] of groups from `first` on
//
// Weights are decoded in registers and used there: up to kDirectRows rows, that is all. Beyond, the
// first tile does so and stores a slice's decoded words to the L1 cache, and the others read them.
#pragma once

#include <type_traits>

#include "cpu/numeric.inl"
#include "cpu/panel_gemm.h"

namespace qk::QK_ISA {
namespace {

constexpr int kPanelVectors = kPanelCols / kLanes;
constexpr int kDirectRows = kTileRows < 5 ? kTileRows : 5;
constexpr int64_t kBlockTiles = 86;        // whose sums stay in the L2 cache
constexpr int64_t kSliceBytes = 32 << 10;  // of a decoded panel
constexpr int64_t kGroupBuffer = 48;       // groups whose scales are at hand
constexpr int64_t kDirectGroups = 32;      // of them in a slice of a direct pass
constexpr int64_t kSliceGroups = 16;       // of them beside a decoded slice, in the L1 cache
constexpr int64_t kAhead = 16384 / 4;      // words that are fetched before they are needed

struct FloatWords {
  using Word = float;
  using Vector = F32;
  static constexpr int kCount = 1;
  static QK_INLINE Vector spread(Word a) { return broadcast(a); }
  static QK_INLINE F32 add(F32 sum, Vector a, Vector b) { return multiply_add(a, b, sum); }
  static QK_INLINE Vector load_vector(const Word* p) { return load(p, Full{}); }
  static QK_INLINE void store_vector(Word* p, Vector x) { store(p, x, Full{}); }
};

// A run of k within one group and one slice, in words of x; `group` counts from the slice's first;
// `starts` is its beginning here, where the offset goes in.
struct Segment {
  int64_t begin, end, group;
  bool starts;
};

// Words that are used several times stay where they are: the compiler would rather load them again
// for each use, which a line on its way from memory is asked for as often.
QK_INLINE void in_register([[maybe_unused]] I32& x) {
#ifdef QK_PAIRS
  asm("" : "+v"(x.v));
#endif
}

QK_INLINE I32 load_words(const int32_t* p) {
  return bits(load(reinterpret_cast<const float*>(p), Full{}));
}

// f(i) with i known at compile time, from 0 on.
template <int kCount, int i = 0, class Body>
QK_INLINE void unrolled(Body body) {
  if constexpr (i < kCount) {
    body(std::integral_constant<int, i>{});
    unrolled<kCount, i + 1>(body);
  }
}

// One slice of a panel: its decoded words if any, its scales, its runs.
template <class Words>
struct Slice {
  const typename Words::Word* decoded;  // [depth][kPanelCols]
  const int32_t* packed;                // [steps][kPanelCols]
  const float *scale, *offset;          // [groups][kPanelCols]
  const Segment* segments;
  int64_t count;
  bool first;  // of the panel: sums start here
  // What to ask for at each run, so many bytes further on each time: a later panel's scales.
  const char* later;
  int64_t later_bytes;
};

// c (+)= sums * scale (* x's scale) (+ x's sums * offset) for R rows and the vectors from column
// `col` on, at the end of the slice's run `s`.
template <class Words, class Groups, int R, int V>
QK_INLINE void flush(const F32 (&sum)[R][V], const Slice<Words>& slice, int64_t s, int col,
                     const float* x_sums, int64_t groups, float* c) {
  const int64_t group = slice.segments[s].group;
  const bool first = slice.first && s == 0;
  [[maybe_unused]] const bool starts = slice.segments[s].starts;
  const float* const scale = slice.scale + group * kPanelCols + col;
  const float* const offset = Groups::kOffset ? slice.offset + group * kPanelCols + col : nullptr;
  if constexpr (Groups::kOffset || Groups::kRowScale) x_sums += group;
  c += col;
  unrolled<V>([&](auto v) {
    const F32 column = load(scale + v * kLanes, Full{});
    F32 shift = column;
    if constexpr (Groups::kOffset) shift = load(offset + v * kLanes, Full{});
    unrolled<R>([&](auto r) {
      float* const p = c + r * kPanelCols + v * kLanes;
      F32 factor = column;
      if constexpr (Groups::kRowScale) factor = column * broadcast(x_sums[r * groups]);
      F32 total = first ? sum[r][v] * factor : multiply_add(sum[r][v], factor, load(p, Full{}));
      if constexpr (Groups::kOffset) {
        if (starts) total = multiply_add(broadcast(x_sums[r * groups]), shift, total);
      }
      store(p, total, Full{});
    });
  });
}

// R rows of a tile times a decoded slice. `next` is where the next tile is, which is asked for.
template <class Words, class Groups, int R>
void tile_decoded(const typename Words::Word* a, const typename Words::Word* next,
                  const Slice<Words>& slice, const float* x_sums, int64_t groups, float* c) {
  for (int64_t s = 0; s < slice.count; ++s) {
    const Segment segment = slice.segments[s];
    for (int64_t i = segment.begin * R; i < segment.end * R; i += 16) __builtin_prefetch(next + i);
    for (int v0 = 0; v0 < kPanelVectors; v0 += kTileVectors) {
      F32 sum[R][kTileVectors];
      unrolled<R>(
          [&](auto r) { unrolled<kTileVectors>([&](auto v) { sum[r][v] = broadcast(0.0f); }); });
      const auto* b = slice.decoded + segment.begin * kPanelCols + v0 * kLanes;
      const auto* x = a + segment.begin * R;
      for (int64_t d = segment.begin; d < segment.end; ++d, b += kPanelCols, x += R) {
        typename Words::Vector right[kTileVectors];
        unrolled<kTileVectors>([&](auto v) { right[v] = Words::load_vector(b + v * kLanes); });
        unrolled<R>([&](auto r) {
          const auto left = Words::spread(x[r]);
          unrolled<kTileVectors>(
              [&](auto v) { sum[r][v] = Words::add(sum[r][v], left, right[v]); });
        });
      }
      flush<Words, Groups>(sum, slice, s, v0 * kLanes, x_sums, groups, c);
    }
  }
}

// R rows times the packed words of a slice, which are decoded on the way and kept if kStore. With
// few rows a step's vectors go to sums of their own, which do not wait for each other.
template <class Decoder, class Groups, bool kStore, int R>
void tile_direct(Decoder decoder, const typename Decoder::Words::Word* a,
                 const Slice<typename Decoder::Words>& slice, const float* x_sums, int64_t groups,
                 float* c, typename Decoder::Words::Word* decoded) {
  using Words = typename Decoder::Words;
  constexpr int kVectors = Decoder::kStep / Words::kCount;
  constexpr int kWanted = R == 1 ? 4 : R == 2 ? 2 : 1;
  constexpr int kChains = kTileVectors < 4 ? 1 : kVectors < kWanted ? kVectors : kWanted;
  for (int64_t s = 0; s < slice.count; ++s) {
    const Segment segment = slice.segments[s];
    for (int v0 = 0; v0 < kPanelVectors; v0 += kTileVectors) {
      F32 sum[kChains][R][kTileVectors];
      unrolled<kChains>([&](auto chain) {
        unrolled<R>([&](auto r) {
          unrolled<kTileVectors>([&](auto v) { sum[chain][r][v] = broadcast(0.0f); });
        });
      });
      const auto* x = a + segment.begin * R;
      const int32_t* w = slice.packed + segment.begin / kVectors * kPanelCols + v0 * kLanes;
      for (int64_t d = segment.begin; d < segment.end; d += kVectors, w += kPanelCols) {
        I32 packed[kTileVectors];
        unrolled<kTileVectors>([&](auto v) {
          __builtin_prefetch(w + v * kLanes + kAhead);  // to L1: it is read once
          packed[v] = load_words(w + v * kLanes);
          if constexpr (R == 1 && !kStore) in_register(packed[v]);
        });
        unrolled<kVectors>([&](auto i) {
          typename Words::Vector right[kTileVectors];
          unrolled<kTileVectors>([&](auto v) {
            if constexpr (kStore) {
              // Loaded again each time: the registers are the sums'.
              right[v] = decoder.template at<i>(load_words(w + v * kLanes));
              Words::store_vector(decoded + (d + i) * kPanelCols + (v0 + v) * kLanes, right[v]);
            } else {
              right[v] = decoder.template at<i>(packed[v]);
            }
          });
          unrolled<R>([&](auto r) {
            const auto left = Words::spread(x[r]);
            unrolled<kTileVectors>([&](auto v) {
              F32& total = sum[i % kChains][r][v];
              total = Words::add(total, left, right[v]);
            });
          });
          x += R;
        });
      }
      unrolled<kChains>([&](auto chain) {
        if constexpr (chain > 0) {
          unrolled<R>([&](auto r) {
            unrolled<kTileVectors>([&](auto v) { sum[0][r][v] = sum[0][r][v] + sum[chain][r][v]; });
          });
        }
      });
      flush<Words, Groups>(sum[0], slice, s, v0 * kLanes, x_sums, groups, c);
      for (int64_t i = 0; i < slice.later_bytes; i += 64) {
        __builtin_prefetch(slice.later + s * slice.later_bytes + i);
      }
    }
  }
}

// Packed words of `steps` steps as the tiles read them.
template <class Decoder>
void decode_slice(Decoder decoder, const int32_t* packed, int64_t steps,
                  typename Decoder::Words::Word* out) {
  using Words = typename Decoder::Words;
  constexpr int kVectors = Decoder::kStep / Words::kCount;
  for (int64_t s = 0; s < steps; ++s, packed += kPanelCols, out += kVectors * kPanelCols) {
    for (int v = 0; v < kPanelCols; v += kLanes) {
      prefetch(packed + v, kAhead);
      const I32 word = load_words(packed + v);
      unrolled<kVectors>([&](auto i) {
        Words::store_vector(out + i * kPanelCols + v, decoder.template at<i>(word));
      });
    }
  }
}

// The runs of k [begin, end) that are within one group.
template <class Words>
int64_t make_segments(int64_t begin, int64_t end, int64_t group, Segment* segments) {
  const int64_t first = begin / group;
  int64_t count = 0;
  for (int64_t k = begin, g = first; k < end; ++g) {
    const int64_t stop = std::min(end, (g + 1) * group);
    segments[count++] = {(k - begin) / Words::kCount, (stop - begin) / Words::kCount, g - first,
                         k == g * group};
    k = stop;
  }
  return count;
}

// Sums c [rows][kPanelCols] of the tiles [first_tile, end_tile) and one panel.
template <class Decoder, class Groups>
void panel_sums(Decoder decoder, const Groups& groups, const PackedRows& x, const int32_t* packed,
                int64_t panel, int64_t first_tile, int64_t end_tile, float* c) {
  using Words = typename Decoder::Words;
  using Word = typename Words::Word;
  constexpr int64_t kDecoded = kSliceBytes / (kPanelCols * sizeof(Word)) * Words::kCount;  // k
  constexpr bool kOffset = Groups::kOffset;
  const bool direct = !Groups::kInside && x.rows <= kDirectRows;
  const int64_t cols = x.depth * Words::kCount, group = std::min(groups.size, cols);
  int64_t length = kDecoded;
  if (direct) length = group > cols / kDirectGroups ? cols : group * kDirectGroups;
  if (!direct && kDecoded / group + 2 > kGroupBuffer) length = (kGroupBuffer - 2) * group;

  alignas(64) Word decoded[Decoder::kPlain ? 1 : kSliceBytes / sizeof(Word)];
  alignas(64) float scale[kGroupBuffer * kPanelCols],
      offset[kOffset ? kGroupBuffer * kPanelCols : 1];
  Segment segments[kGroupBuffer];
  int64_t loaded = 0, loaded_end = 0;  // groups in the buffers
  for (int64_t k = 0; k < cols; k += length) {
    const int64_t end = std::min(cols, k + length), first = k / group;
    const int64_t count = make_segments<Words>(k, end, group, segments);
    if (first + count > loaded_end) {
      loaded = first;
      loaded_end =
          std::min(x.groups, first + std::max(count, direct ? kDirectGroups : kSliceGroups));
      groups.fill(panel, loaded, loaded_end - loaded, scale, offset);
    }
    Slice<Words> slice = {};
    slice.packed = packed + k / Decoder::kStep * kPanelCols;
    slice.scale = scale + (first - loaded) * kPanelCols;
    slice.offset = kOffset ? offset + (first - loaded) * kPanelCols : nullptr;
    slice.segments = segments;
    slice.count = count;
    slice.first = k == 0;
    if constexpr (requires { groups.later(slice, panel, first); }) {
      if (direct) groups.later(slice, panel, first);
    }
    if constexpr (Decoder::kPlain) {
      slice.decoded = reinterpret_cast<const Word*>(slice.packed);
    } else {
      slice.decoded = decoded;
    }
    if constexpr (Groups::kInside) {
      decode_slice(decoder, slice.packed, (end - k) / Decoder::kStep, decoded);
      groups.apply(panel, k, end - k, decoded);
    }
    for (int64_t t = first_tile; t < end_tile; ++t) {
      const int64_t row = x.first_row(t), rows = x.first_row(t + 1) - row;
      const Word* const a =
          static_cast<const Word*>(x.words) + row * x.depth + k / Words::kCount * rows;
      const float* const sums =
          kOffset || Groups::kRowScale ? x.sums + row * x.groups + first : nullptr;
      float* const out = c + (row - x.first_row(first_tile)) * kPanelCols;
      unrolled<kTileRows>([&](auto i) {
        constexpr int R = i + 1;
        if (rows != R) return;
        if constexpr (R <= kDirectRows && !Groups::kInside) {
          if (direct) {
            return tile_direct<Decoder, Groups, false, R>(decoder, a, slice, sums, x.groups, out,
                                                          nullptr);
          }
        }
        if constexpr (!Decoder::kPlain && !Groups::kInside) {
          if (t == first_tile) {
            return tile_direct<Decoder, Groups, true, R>(decoder, a, slice, sums, x.groups, out,
                                                         decoded);
          }
        }
        tile_decoded<Words, Groups, R>(a, a + rows * x.depth, slice, sums, x.groups, out);
      });
    }
  }
}

// Sums c [rows][kPanelCols], with bias, to y from (row, col) on.
template <class T, class B>
void write_rows(const float* c, int64_t row, int64_t rows, int64_t col, const PanelOutput& out) {
  const int64_t cols = std::min(kPanelCols, out.cols - col);
  T* y = static_cast<T*>(out.y) + row * out.stride + col;
  for (int64_t r = 0; r < rows; ++r, c += kPanelCols, y += out.stride) {
    for_lanes(cols, [&](int64_t i, auto lanes) {
      F32 value = load(c + i, Full{});
      if (out.bias) value = value + load(static_cast<const B*>(out.bias) + col + i, lanes);
      store(y + i, value, lanes);
    });
  }
}

// y of the tiles [first_tile, end_tile) and one panel.
template <class Decoder, class Groups>
void panel_gemm(Decoder decoder, const Groups& groups, const PackedRows& x, const int32_t* packed,
                int64_t panel, int64_t first_tile, int64_t end_tile, const PanelOutput& out) {
  alignas(64) float c[kBlockTiles * kTileRows * kPanelCols];
  for (int64_t t = first_tile; t < end_tile; t += kBlockTiles) {
    const int64_t end = std::min(end_tile, t + kBlockTiles);
    panel_sums(decoder, groups, x, packed, panel, t, end, c);
    const int64_t row = x.first_row(t), rows = x.first_row(end) - row, col = panel * kPanelCols;
    visit_float(out.dtype, [&]<class T>(T) {
      if (out.bias_dtype == DType::kFloat32) {
        write_rows<T, float>(c, row, rows, col, out);
      } else {
        write_rows<T, T>(c, row, rows, col, out);
      }
    });
  }
}

// ---- x ----

// Row `r` of x as fp32, its columns in order.
template <class T>
void read_row(const RowsInput& input, int64_t r, float* out) {
  const T* const x =
      static_cast<const T*>(input.x) + (input.order ? input.order[r] : r) * input.stride;
  if (input.perm) {
    T copy[kLanes] = {};
    for (int64_t k = 0; k < input.cols; k += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, input.cols - k);
      for (int64_t i = 0; i < count; ++i) copy[i] = x[input.perm[k + i]];
      store(out + k, load(copy, Full{}), Full{});
    }
  } else {
    for_lanes(input.cols,
              [&](int64_t k, auto lanes) { store(out + k, load(x + k, lanes), lanes); });
  }
}

// The sum of n numbers, 16 sums side by side.
inline float sum_of(const float* x, int64_t n) {
  F32 sum = broadcast(0.0f);
  for_lanes(n, [&](int64_t i, auto lanes) { sum = sum + load(x + i, lanes); });
  float lane[kLanes];
  store(lane, sum, Full{});
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  }
  return lane[0];
}

// Tile `t` of x, whose rows `read(r, row)` gives as fp32 numbers. `row` is room for depth * kCount
// + kLanes of them.
template <class Words, class Read>
void pack_tile_of(const PackedRows& x, int64_t cols, int64_t t, float* row, Read read) {
  using Word = typename Words::Word;
  const int64_t first = x.first_row(t), rows = x.first_row(t + 1) - first;
  Word* const words = static_cast<Word*>(x.words) + first * x.depth;
  for (int64_t r = 0; r < rows; ++r) {
    read(first + r, row);
    for (int64_t k = cols; k < x.depth * Words::kCount; ++k) row[k] = 0.0f;
    if constexpr (Words::kCount == 2) {
      uint32_t pair[2];
      for (int64_t d = 0; d < x.depth; ++d) {
        std::memcpy(pair, row + 2 * d, sizeof(pair));  // bf16 numbers: the upper halves
        words[d * rows + r] = static_cast<Word>(pair[0] >> 16 | (pair[1] & 0xffff0000u));
      }
    } else {
      for (int64_t d = 0; d < x.depth; ++d) words[d * rows + r] = row[d];
    }
  }
}

// Tile `t` of x, with its sums.
template <class Words>
void pack_tile(const RowsInput& input, const PackedRows& x, int64_t t, float* row) {
  pack_tile_of<Words>(x, input.cols, t, row, [&](int64_t r, float* out) {
    visit_float(input.dtype, [&]<class T>(T) { read_row<T>(input, r, out); });
    for (int64_t g = 0; x.sums && g < x.groups; ++g) {
      const int64_t k = g * x.group;
      x.sums[r * x.groups + g] = sum_of(out + k, std::min(x.group, input.cols - k));
    }
  });
}

}  // namespace
}  // namespace qk::QK_ISA
