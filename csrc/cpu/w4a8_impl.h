// See w4a8.h. An ISA's file, or w4a8_narrow.inl, has the tile: kTileRows and `run_tile`.
#pragma once

#include <algorithm>

#include "cpu/quantize_impl.h"
#include "cpu/reduce_impl.h"
#include "cpu/scale_impl.h"
#include "cpu/w4a8.h"

namespace qk::QK_ISA {
namespace {

// Words of K at a time: such a block of a panel stays in the L1 cache for all rows.
constexpr int64_t kBlockWords = 64;
constexpr int64_t kLineBytes = 64, kWordLines = 4 * kW4Panel / kLineBytes;

// Up to kTileRows rows by groups [first, last) of a panel, added to `sums`.
struct Tile {
  const uint32_t* words;  // of the panel
  DType scale_dtype;
  const void* scale;
  const int8_t* zero_point;
  int64_t cols, group, groups;
  int64_t group_words;  // or 0 where groups begin or end within a word
  int64_t first, last;

  int64_t rows;
  const int8_t* codes;
  int64_t stride;
  const int32_t* minus;
  float* sums;

  const char* fetch;  // fetched meanwhile, `rate` lines with every word, or if `more` is false the
  int64_t rate;       // first of them again and again: nothing more
  bool more;
  const int8_t* ahead;  // the codes of the tile that follows, or of this one
};

// In units of four columns.
QK_INLINE int64_t group_begin(const Tile& tile, int64_t g) { return g * tile.group / 4; }
QK_INLINE int64_t group_end(const Tile& tile, int64_t g) {
  return g + 1 == tile.groups ? (tile.cols + 3) / 4 : (g + 1) * tile.group / 4;
}

// The scales of group g, or if they have to be widened, `wide` with them.
QK_INLINE const float* load_scales(const Tile& tile, int64_t g, float* wide) {
  if (tile.scale_dtype == DType::kFloat32) {
    return static_cast<const float*>(tile.scale) + g * kW4Panel;
  }
  const auto widen = [&]<class T>(T) {
    const T* const from = static_cast<const T*>(tile.scale) + g * kW4Panel;
    for (int i = 0; i < kW4Panel; i += kLanes) store(wide + i, load(from + i, Full{}), Full{});
  };
  tile.scale_dtype == DType::kFloat16 ? widen(Half{}) : widen(BFloat16{});
  return wide;
}

void run_tile(const Tile& tile);

// ---- activations ----

template <class T>
void quantize_rows(const T* x, int64_t stride, int64_t cols, int64_t group, int64_t begin,
                   int64_t end, const W4A8Tokens& tokens) {
  const int64_t groups = cols / group, padded = w4a8_words(cols) * 8;
  for (int64_t r = begin; r < end; ++r) {
    const T* const row = x + r * stride;
    const float size = span_absmax(row, cols);
    symmetric_scales(&size, 1, 127.0f, DType::kFloat32, tokens.scale + r);
    int8_t* const codes = tokens.codes + r * tokens.stride;
    row_quantize_int(row, r + 1 < end ? row + stride : nullptr, cols, cols, tokens.scale + r,
                     nullptr, -127, 127, codes);
    std::fill(codes + cols, codes + padded, int8_t{0});
    for (int64_t g = 0; g < groups; ++g) {
      int32_t sum = 0;
      for (int64_t k = g * group; k < (g + 1) * group; ++k) sum -= codes[k];
      tokens.minus[r * groups + g] = sum;
    }
  }
}

void quantize_tokens(DType dtype, const void* x, int64_t stride, int64_t cols, int64_t group,
                     int64_t begin, int64_t end, const W4A8Tokens& tokens) {
  if (cols == 0) {
    std::fill(tokens.scale + begin, tokens.scale + end, 1.0f);
    return;
  }
  visit_float(dtype, [&]<class T>(T) {
    quantize_rows(static_cast<const T*>(x), stride, cols, group, begin, end, tokens);
  });
}

// ---- results ----

template <class T>
void finish(const W4A8Weight& weight, const W4A8Task& task) {
  const int64_t first = task.panel * kW4Panel, columns = std::min(kW4Panel, weight.rows - first);
  float bias[kW4Panel];
  if (weight.bias) {
    visit_float(weight.bias_dtype, [&]<class B>(B) {
      for_lanes(columns, [&](int64_t i, auto lanes) {
        store(bias + i, load(static_cast<const B*>(weight.bias) + first + i, lanes), lanes);
      });
    });
  }
  for (int64_t r = task.begin; r < task.end; ++r) {
    const float* const sums = task.sums + (r - task.begin) * kW4Panel;
    T* const out = static_cast<T*>(task.out) + r * task.stride + first;
    const F32 scale = broadcast(task.tokens.scale[r]);
    for_lanes(columns, [&](int64_t i, auto lanes) {
      F32 y = load(sums + i, lanes) * scale;
      if (weight.bias) y = y + load(bias + i, lanes);
      store(out + i, y, lanes);
    });
  }
}

void multiply(const W4A8Weight& weight, const W4A8Task& task) {
  const int64_t rows = task.end - task.begin, words = w4a8_words(weight.cols),
                groups = weight.groups();
  const int64_t scale_bytes = weight.scale_dtype == DType::kFloat32 ? 4 : 2;
  Tile tile{};
  tile.words = weight.words + task.panel * words * kW4Panel;
  tile.scale_dtype = weight.scale_dtype;
  tile.scale =
      static_cast<const char*>(weight.scale) + task.panel * groups * kW4Panel * scale_bytes;
  tile.zero_point =
      weight.zero_point ? weight.zero_point + task.panel * groups * kW4Panel : nullptr;
  tile.cols = weight.cols;
  tile.group = weight.group;
  tile.groups = groups;
  // The columns beyond K of a whole row are zero in the codes of the activations.
  tile.group_words = weight.group % 8 == 0 || groups == 1 ? w4a8_words(weight.group) : 0;
  tile.stride = task.tokens.stride;

  std::fill(task.sums, task.sums + rows * kW4Panel, 0.0f);
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  const int64_t at_once = weight.group ? std::max<int64_t>(1, kBlockWords * 8 / weight.group) : 1;
  const char* const next = reinterpret_cast<const char*>(
      task.next < 0 ? nullptr : weight.words + task.next * words * kW4Panel);
  for (int64_t g = 0; g < groups; g += at_once) {
    tile.first = g;
    tile.last = std::min(groups, g + at_once);
    // The block that follows, here or in the next panel.
    const int64_t count = (group_end(tile, tile.last - 1) + 1) / 2 - group_begin(tile, g) / 2;
    const char* const following =
        tile.last < groups ? reinterpret_cast<const char*>(
                                 tile.words + group_begin(tile, tile.last) / 2 * kW4Panel)
                           : next;
    tile.rate = tiles == 1 ? 4 : tiles <= 3 ? 2 : 1;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t begin = rows * t / tiles, end = rows * (t + 1) / tiles, r = task.begin + begin;
      tile.rows = end - begin;
      tile.codes = task.tokens.codes + r * task.tokens.stride;
      tile.ahead = t + 1 < tiles ? tile.codes + tile.rows * tile.stride : tile.codes;
      tile.minus = task.tokens.minus + r * groups;
      tile.sums = task.sums + begin * kW4Panel;
      tile.more = following && t * tile.rate < kWordLines;
      tile.fetch = tile.more ? following + t * tile.rate * count * kLineBytes
                             : reinterpret_cast<const char*>(tile.codes);
      run_tile(tile);
    }
  }
  visit_float(task.dtype, [&]<class T>(T) { finish<T>(weight, task); });
}

}  // namespace
}  // namespace qk::QK_ISA
