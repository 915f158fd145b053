// See w8a8.h. An ISA's file says what a tile in registers is, kRows rows of kVectors vectors of 16
// columns, and how four codes of a row meet four of each column: Codes, Weights and `dot`.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "cpu/numeric.inl"
#include "cpu/quantize_impl.h"
#include "cpu/reduce_impl.h"
#include "cpu/scale_impl.h"
#include "cpu/w8a8.h"

namespace qk::QK_ISA {
namespace {

constexpr int kSigned = 128;  // what makes a signed code unsigned
// Words of K at a time: a panel's block, and the one fetched meanwhile, stay in the L2 cache.
constexpr int64_t kBlockWords = 1024;
// Few tiles hardly hide that blocks of that size come from L2 for each of them: smaller ones stay
// in L1. Measured: 3 % at 12 and 16 rows, nothing from 24 on, and a loss for a single tile.
constexpr int64_t kFewTiles = 3, kFewTilesWords = 128;

QK_INLINE I32 load_ints(const int32_t* p) {
  I32 x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
QK_INLINE void store_ints(int32_t* p, I32 x) { std::memcpy(p, &x, sizeof(x)); }

// ---- activations ----

template <class T>
void quantize_row(const Int8Input& input, const T* x, const T* ahead, uint8_t* codes, float* scale,
                  int32_t* offset) {
  const bool symmetric = input.scale ? input.zero_point == nullptr : input.symmetric;
  const int least = symmetric ? -127 : -128, most = 127;
  int8_t zero = 0;
  float s, result;
  if (input.scale) {
    s = *input.scale;
    if (input.zero_point) zero = *input.zero_point;
    const float size = span_absmax(x, input.cols);
    result = size != size ? size : s;  // NaN has no code: the row says so
  } else if (symmetric) {
    const float size = span_absmax(x, input.cols);
    symmetric_scales(&size, 1, 127.0f, DType::kFloat32, &s);
    result = s;
  } else {
    float low, high;
    span_minmax(x, x, input.cols, &low, &high);
    asymmetric_scales(&low, &high, 1, least, most, DType::kFloat32, &s, &zero);
    result = s;
  }
  *scale = result;
  *offset = zero + kSigned;
  const F32 inverse = broadcast(1.0f / s), low = broadcast(static_cast<float>(least - zero)),
            high = broadcast(static_cast<float>(most - zero));
  const I32 add = broadcast(zero + kSigned);
  map_bytes(x, ahead, input.cols, codes,
            [=](F32 v) { return int_code(v * inverse, low, high, add); });
}

template <class T>
void quantize_rows(const Int8Input& input, int64_t begin, int64_t end, const Int8Rows& rows,
                   void* scratch) {
  for (int64_t r = begin; r < end; ++r) {
    const T* x = static_cast<const T*>(input.x) + r * input.stride;
    const T* const ahead = r + 1 < end ? x + input.stride : nullptr;
    if (input.left_out_count > 0) {
      T* const copy = static_cast<T*>(scratch);
      std::memcpy(copy, x, static_cast<size_t>(input.cols) * sizeof(T));
      for (int64_t i = 0; i < input.left_out_count; ++i) copy[input.left_out[i]] = T{};
      x = copy;
    }
    quantize_row(input, x, ahead, rows.codes + r * rows.stride, rows.scale + r, rows.offset + r);
  }
}

inline void take_codes(const Int8Input& input, int64_t begin, int64_t end, const Int8Rows& rows) {
  const int64_t cols = input.cols;  // bytes are stored below, which could be those of input.cols
  for (int64_t r = begin; r < end; ++r) {
    const uint8_t* const x = static_cast<const uint8_t*>(input.x) + r * input.stride;
    uint8_t* const codes = rows.codes + r * rows.stride;
    for (int64_t k = 0; k < cols; ++k) codes[k] = x[k] ^ kSigned;
    rows.scale[r] = 1.0f;
    rows.offset[r] = kSigned;
  }
}

void quantize(const Int8Input& input, int64_t begin, int64_t end, const Int8Rows& rows,
              void* scratch) {
  if (input.dtype == DType::kInt8 || input.cols == 0) {
    take_codes(input, begin, end, rows);
  } else {
    visit_float(input.dtype,
                [&]<class T>(T) { quantize_rows<T>(input, begin, end, rows, scratch); });
  }
  // The last word meets weights of zero: any number does, but it must be one.
  const int64_t cols = input.cols, more = w8a8_words(cols) * 4 - cols;
  for (int64_t r = begin; more > 0 && r < end; ++r) {
    std::memset(rows.codes + r * rows.stride + cols, kSigned, static_cast<size_t>(more));
  }
}

// ---- sums ----

// What is fetched during a tile's first block of lines: the codes of the tile that follows, from
// which the hardware sees a new stream for every row, and where its own results go.
struct Soon {
  const uint8_t* codes;
  const char* out;
  int64_t out_stride;  // in bytes
  int64_t out_bytes;   // of a row
};

// A tile's sums over `words` words of four, onto those that are there if `add`. With each word
// kFetch lines of what follows are fetched.
template <int kCount, int kFetch>
__attribute__((noinline)) void tile(const uint8_t* a, int64_t stride, const int8_t* w,
                                    int64_t words, const int8_t* fetch, const Soon& soon, bool add,
                                    int32_t* sums) {
  constexpr int64_t kLine = 16;  // words
  I32 sum[kCount][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sum[i][v] = add ? load_ints(sums + i * kPanel + v * kLanes) : broadcast(0);
    }
  }
  const uint8_t* codes_ahead = soon.codes;
  const char *out = soon.out, *const out_end = out + kCount * soon.out_stride;
  for (int64_t line = 0; line < words; line += kLine) {
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) __builtin_prefetch(codes_ahead + i * stride, 0, 2);
    codes_ahead += 64;
    if (out < out_end) {
      for (int64_t i = 0; i < soon.out_bytes; i += 64) __builtin_prefetch(out + i, 1, 2);
      out += soon.out_stride;
    }
    const int64_t end = line + kLine < words ? line + kLine : words;
    for (int64_t k = line; k < end; ++k, w += 4 * kPanel, a += 4) {
#pragma GCC unroll 4
      for (int i = 0; i < kFetch; ++i) __builtin_prefetch(fetch + i * 64, 0, 2);
      fetch += kFetch * 64;
      Weights weights[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) weights[v] = load_weights(w + v * 4 * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) {
        const Codes codes = load_codes(a + i * stride);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[i][v] = dot(sum[i][v], codes, weights[v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store_ints(sums + i * kPanel + v * kLanes, sum[i][v]);
  }
}

using Tile = void (*)(const uint8_t*, int64_t, const int8_t*, int64_t, const int8_t*, const Soon&,
                      bool, int32_t*);

template <int kFetch, int... kCounts>
QK_INLINE Tile tile_of(int64_t rows, std::integer_sequence<int, kCounts...>) {
  static constexpr Tile kTiles[] = {tile<kCounts + 1, kFetch>...};
  return kTiles[rows - 1];
}
QK_INLINE Tile tile_of(int64_t rows, int64_t fetch) {
  constexpr auto kCounts = std::make_integer_sequence<int, kRows>{};
  return fetch == 0   ? tile_of<0>(rows, kCounts)
         : fetch == 1 ? tile_of<1>(rows, kCounts)
         : fetch == 2 ? tile_of<2>(rows, kCounts)
                      : tile_of<4>(rows, kCounts);
}

// Lines of the block that follows, spread evenly over the tiles at hand, some with each word.
struct Fetch {
  const int8_t* at;
  int64_t lines = 0, done = 0;
  int64_t tiles, tile = 0;

  Fetch(const int8_t* block, int64_t words, int64_t count) : at(block), tiles(count) {
    if (block) lines = words * (4 * kPanel / 64);
  }
  // f(lines a word, where, first word, last word) for the words of the next tile.
  template <class Body>
  QK_INLINE void run(int64_t words, Body body) {
    const int64_t due = lines * ++tile / tiles - done;
    const int64_t wanted = (due + words - 1) / words, rate = wanted > 2 ? 4 : wanted;
    const int64_t with = due <= 0 ? 0 : std::min(words, (lines - done) / rate);
    if (with > 0) body(rate, at, int64_t{0}, with);
    if (with < words) body(int64_t{0}, at, with, words);
    at += with * rate * 64;
    done += with * rate;
  }
};

// ---- results ----

struct Panel {
  float scale[kPanel], bias[kPanel];
  I32 column_sum[kPanel / kLanes];
  I32 signed_sum[kPanel / kLanes];  // times kSigned, which most rows want
};

inline void load_floats(DType dtype, const void* from, int64_t n, float* to) {
  visit_float(dtype, [&]<class T>(T) {
    for_lanes(n, [&](int64_t i, auto lanes) {
      store(to + i, load(static_cast<const T*>(from) + i, lanes), Full{});
    });
  });
}

inline void load_panel(const Int8Task& task, Panel& panel) {
  const int64_t words = w8a8_words(task.cols);
  for (int v = 0; v < kPanel / kLanes; ++v) {
    std::memcpy(&panel.column_sum[v], task.panel + (words * kPanel + v * kLanes) * 4, 4 * kLanes);
    panel.signed_sum[v] = multiply_low(panel.column_sum[v], broadcast(kSigned));
  }
  if (task.one_scale) {
    std::fill_n(panel.scale, kPanel, *task.scale);
  } else if (task.scale) {
    load_floats(DType::kFloat32, task.scale, task.columns, panel.scale);
  }
  if (task.bias) load_floats(task.bias_dtype, task.bias, task.columns, panel.bias);
}

// Rows [begin, end) from their sums, which begin at `sums`.
template <class T>
void finish(const Int8Task& task, const Panel& panel, int64_t begin, int64_t end,
            const int32_t* sums) {
  for (int64_t r = begin; r < end; ++r, sums += kPanel) {
    T* const out = static_cast<T*>(task.out) + r * task.stride;
    const F32 row_scale = broadcast(task.rows.scale[r]);
    const int32_t offset = task.rows.offset[r];
    const float* const more = task.more ? task.more + r * kPanel : nullptr;
    for_lanes(task.columns, [&](int64_t i, auto lanes) {
      const int64_t v = i / kLanes;
      const I32 acc = load_ints(sums + i) -
                      (offset == kSigned ? panel.signed_sum[v]
                                         : multiply_low(broadcast(offset), panel.column_sum[v]));
      if constexpr (std::is_same_v<T, int32_t>) {
        store(reinterpret_cast<float*>(out + i), from_bits(acc), lanes);
      } else {
        const F32 weight_scale = load(panel.scale + i, Full{});
        F32 y = to_float(acc) * (row_scale * weight_scale);
        if (more) y = y + load(more + i, Full{}) * weight_scale;
        if (task.bias) y = y + load(panel.bias + i, Full{});
        store(out + i, y, lanes);
      }
    });
  }
}

template <class T>
void multiply_panel(const Int8Task& task) {
  Panel panel;
  load_panel(task, panel);
  const int64_t rows = task.end - task.begin, tiles = (rows + kRows - 1) / kRows;
  const int64_t most = tiles > 1 && tiles <= kFewTiles ? kFewTilesWords : kBlockWords;
  const int64_t words = w8a8_words(task.cols), blocks = (words + most - 1) / most;
  const auto start = [=](int64_t block) { return words * block / blocks; };
  const int64_t parts = kPanel / (kVectors * kLanes);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = start(b), count = start(b + 1) - first;
    const bool last = b + 1 == blocks;
    const int8_t* const w = task.panel + first * 4 * kPanel;
    const int8_t* const next = last ? task.next : w + count * 4 * kPanel;
    Fetch fetch(next, last ? start(1) : start(b + 2) - start(b + 1), tiles * parts);
    const uint8_t* const codes = task.rows.codes + first * 4;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t begin = task.begin + rows * t / tiles,
                    end = task.begin + rows * (t + 1) / tiles;
      const uint8_t* const a = codes + begin * task.rows.stride;
      // After the last tile come the first rows once more, of the next block or panel.
      const uint8_t* const ahead = t + 1 < tiles ? codes + end * task.rows.stride
                                                 : task.rows.codes + task.begin * task.rows.stride +
                                                       (last ? 0 : first + count) * 4;
      int32_t* const sums = task.sums + (blocks > 1 ? begin - task.begin : 0) * kPanel;
      for (int64_t p = 0; p < parts; ++p) {
        const int64_t column = p * kVectors * kLanes;
        const Soon soon = {ahead,
                           static_cast<const char*>(task.out) +
                               (begin * task.stride + column) * static_cast<int64_t>(sizeof(T)),
                           last ? task.stride * static_cast<int64_t>(sizeof(T)) : 0,
                           kVectors * kLanes * static_cast<int64_t>(sizeof(T))};
        fetch.run(count, [&](int64_t rate, const int8_t* at, int64_t from, int64_t to) {
          tile_of(end - begin, rate)(a + from * 4, task.rows.stride,
                                     w + (from * kPanel + column) * 4, to - from, at, soon,
                                     b > 0 || from > 0, sums + column);
        });
      }
      if (last) finish<T>(task, panel, begin, end, sums);
    }
  }
  if (blocks == 0) {
    std::fill_n(task.sums, kPanel, 0);
    for (int64_t r = task.begin; r < task.end; ++r) finish<T>(task, panel, r, r + 1, task.sums);
  }
}

void multiply(const Int8Task& task) {
  if (task.dtype == DType::kInt8) return multiply_panel<int32_t>(task);
  visit_float(task.dtype, [&]<class T>(T) { multiply_panel<T>(task); });
}

// ---- columns in 16 bit ----

template <int kCount>
QK_INLINE void column_tile(const int8_t* panel, const int32_t* columns, int64_t count,
                           const float* x, float* sums) {
  F32 sum[kCount];
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) sum[i] = broadcast(0.0f);
  for (int64_t j = 0; j < count; ++j) {
    // The wanted code comes lowest in each word, and goes up to where its sign is the word's.
    const int64_t k = columns[j];
    I32 word;
    std::memcpy(&word, panel + k / 4 * 4 * kPanel + k % 4, 4 * kLanes);
    const F32 weight = to_float(shift_left<24>(word)) * broadcast(0x1p-24f);
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) sum[i] = sum[i] + broadcast(x[i * count + j]) * weight;
  }
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) store(sums + i * kPanel, sum[i], Full{});
}

void multiply_columns(const int8_t* panel, const int32_t* columns, int64_t count, const float* x,
                      int64_t rows, float* sums) {
  for (int64_t r = 0; r < rows; r += 4) {
    for (int64_t c = 0; c < kPanel; c += kLanes) {
      if (r + 4 <= rows) {
        column_tile<4>(panel + c * 4, columns, count, x + r * count, sums + r * kPanel + c);
      } else {
        for (int64_t i = r; i < rows; ++i) {
          column_tile<1>(panel + c * 4, columns, count, x + i * count, sums + i * kPanel + c);
        }
      }
    }
  }
}

}  // namespace
}  // namespace qk::QK_ISA
