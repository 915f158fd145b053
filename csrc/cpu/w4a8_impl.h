// See w4a8.h. An ISA's file, or w4a8_narrow.inl, has the tile: kTileRows,
// kOwnStream (whether a tile alone fetches what it will read itself) and `run_tile`.
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

QK_INLINE void fetch_lines(const void* from, int64_t bytes) {
  const char* const p = static_cast<const char*>(from);
  for (int64_t i = 0; i < bytes; i += kLineBytes) __builtin_prefetch(p + i, 0, 2);
}

// What a panel holds, by groups.
struct Panel {
  const uint32_t* words;
  const char* scale;
  const int8_t* zero_point;
  int64_t scale_bytes;

  Panel(const W4A8Weight& weight, int64_t panel)
      : words(weight.words + panel * w4a8_words(weight.cols) * kW4Panel),
        zero_point(nullptr),
        scale_bytes(weight.scale_dtype == DType::kFloat32 ? 4 : 2) {
    const int64_t first = panel * weight.groups() * kW4Panel;
    scale = static_cast<const char*>(weight.scale) + first * scale_bytes;
    if (weight.zero_point) zero_point = weight.zero_point + first;
  }
  // Scales and zero points of some groups.
  void fetch_scales(int64_t group, int64_t count) const {
    fetch_lines(scale + group * kW4Panel * scale_bytes, count * kW4Panel * scale_bytes);
    if (zero_point) fetch_lines(zero_point + group * kW4Panel, count * kW4Panel);
  }
};

// Groups at a time.
int64_t block_groups(const W4A8Weight& weight) {
  const int64_t count = weight.group ? kBlockWords * 8 / weight.group : 1;
  return std::max<int64_t>(1, std::min(count, weight.groups()));
}

void fetch_panel(const W4A8Weight& weight, int64_t panel) {
  if (weight.cols == 0) return;
  const Panel from(weight, panel);
  from.fetch_scales(0, block_groups(weight));
  fetch_lines(from.words, std::min(kBlockWords, w4a8_words(weight.cols)) * kW4Panel * 4);
}

void multiply(const W4A8Weight& weight, const W4A8Task& task) {
  const int64_t rows = task.end - task.begin, groups = weight.groups();
  const Panel panel(weight, task.panel), next(weight, std::max<int64_t>(0, task.next));
  Tile tile{};
  tile.words = panel.words;
  tile.scale_dtype = weight.scale_dtype;
  tile.scale = panel.scale;
  tile.zero_point = panel.zero_point;
  tile.cols = weight.cols;
  tile.group = weight.group;
  tile.groups = groups;
  // The columns beyond K of a whole row are zero in the codes of the activations.
  tile.group_words = weight.group % 8 == 0 || groups == 1 ? w4a8_words(weight.group) : 0;
  tile.stride = task.tokens.stride;

  std::fill(task.sums, task.sums + rows * kW4Panel, 0.0f);
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows, at_once = block_groups(weight);
  const int64_t out_bytes = task.dtype == DType::kFloat32 ? 4 : 2;
  // A tile alone reads memory as fast as it goes: it fetches its own stream, not far ahead, or with
  // one or two rows leaves it to the hardware.
  tile.rate = tiles == 1 ? (kOwnStream || rows <= 2 ? 0 : 4) : tiles <= 3 ? 2 : 1;
  for (int64_t g = 0; g < groups; g += at_once) {
    tile.first = g;
    tile.last = std::min(groups, g + at_once);
    const bool last = tile.last == groups;
    // The block that follows, here or in the next panel.
    const uint32_t* const following =
        !last ? panel.words + group_begin(tile, tile.last) / 2 * kW4Panel
              : (task.next < 0 ? nullptr : next.words);
    if (following && !(kOwnStream && tile.rate == 0)) {
      const int64_t from = last ? 0 : tile.last;
      (last ? next : panel).fetch_scales(from, std::min(at_once, groups - from));
    }
    const int64_t first_word = group_begin(tile, g) / 2;
    const int64_t count = (group_end(tile, tile.last - 1) + 1) / 2 - first_word;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t begin = rows * t / tiles, end = rows * (t + 1) / tiles, r = task.begin + begin;
      tile.rows = end - begin;
      tile.codes = task.tokens.codes + r * task.tokens.stride;
      tile.minus = task.tokens.minus + r * groups;
      tile.sums = task.sums + begin * kW4Panel;
      tile.more = following && tile.rate > 0 && t * tile.rate < kWordLines;
      tile.fetch =
          tile.more ? reinterpret_cast<const char*>(following) + t * tile.rate * count * kLineBytes
                    : reinterpret_cast<const char*>(tile.codes);
      // The codes of the next tile, and where results will go.
      for (int64_t i = end; t + 1 < tiles && i < rows * (t + 2) / tiles; ++i) {
        const int8_t* const codes = task.tokens.codes + (task.begin + i) * task.tokens.stride;
        fetch_lines(codes + first_word * 8, std::min(count, kBlockWords) * 8);
      }
      for (int64_t i = r; last && i < task.begin + end; ++i) {
        char* const out =
            static_cast<char*>(task.out) + (i * task.stride + task.panel * kW4Panel) * out_bytes;
        for (int64_t j = 0; j < kW4Panel * out_bytes; j += kLineBytes) {
          __builtin_prefetch(out + j, 1, 2);
        }
      }
      run_tile(tile);
    }
  }
  visit_float(task.dtype, [&]<class T>(T) { finish<T>(weight, task); });
}

}  // namespace
}  // namespace qk::QK_ISA
