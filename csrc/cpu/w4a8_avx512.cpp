// The kernels of w4a8.h for AVX-512 VNNI: one instruction for four codes of 16 columns.
#include "cpu/simd_avx512.h"

namespace qk::avx512 {
namespace {
// 24 sums, 4 vectors of weights and one of codes in 32 registers.
constexpr int kTileRows = 6, kVectors = 4;
constexpr bool kOwnStream = true;
}  // namespace
}  // namespace qk::avx512

#include "cpu/unroll.h"
#include "cpu/w4a8.inl"

namespace qk::avx512 {
namespace {

template <int kRows>
using Sums = __m512i[kRows][kVectors];

// The four columns of K in the low or the high halves of the bytes, onto the sums.
template <bool kHigh, int kRows>
QK_INLINE void add_half(Sums<kRows>& sums, const uint32_t* words, const int8_t* codes,
                        int64_t stride) {
  const __m512i low = _mm512_set1_epi8(15);
  __m512i weights[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const __m512i both = _mm512_loadu_si512(words + v * kLanes);
    weights[v] = _mm512_and_si512(kHigh ? _mm512_srli_epi16(both, 4) : both, low);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    int32_t four;
    std::memcpy(&four, codes + i * stride + (kHigh ? 4 : 0), sizeof(four));
    const __m512i a = _mm512_set1_epi32(four);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[i][v] = _mm512_dpbusd_epi32(sums[i][v], weights[v], a);
  }
}

// Here the sums are in registers. Without this GCC 12 keeps many of them in memory, in the loop
// too.
template <int kRows>
QK_INLINE void pin(Sums<kRows>& sums) {
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    asm volatile("" : "+v"(sums[i][0]), "+v"(sums[i][1]), "+v"(sums[i][2]), "+v"(sums[i][3]));
  }
}

// Where the sums of group g begin.
template <int kRows>
QK_INLINE void start(Sums<kRows>& sums, const Tile& tile, int64_t g) {
  if (!tile.zero_point) {  // one product for all columns
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const __m512i sum = _mm512_set1_epi32(8 * tile.minus[i * tile.groups + g]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[i][v] = sum;
    }
    return;
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const __m512i zero = _mm512_add_epi32(
        _mm512_set1_epi32(8), load_signed(tile.zero_point + g * kW4Panel + v * kLanes, Full{}).v);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      sums[i][v] = _mm512_mullo_epi32(zero, _mm512_set1_epi32(tile.minus[i * tile.groups + g]));
    }
  }
}

template <int kRows>
QK_INLINE void add_scaled(const Sums<kRows>& sums, const float* scale, float* to) {
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const F32 s = load(scale + v * kLanes, Full{});
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      float* const p = to + i * kW4Panel + v * kLanes;
      // Not the plain conversion, in which GCC 12 finds a register without a value.
      const F32 sum = {_mm512_maskz_cvtepi32_ps(0xffff, sums[i][v])};
      store(p, load(p, Full{}) + sum * s, Full{});
    }
  }
}

// Where a tile is alone all that it reads is one stream, fetched so far ahead.
constexpr int64_t kWordsAhead = 4096 / 4, kGroupsAhead = 4;
// Words of a group that is too short for sums in memory: 6 to 15 % at 32 columns, nothing at 128.
constexpr int64_t kShortWords = 8;

// One group of whole words, kFetch lines fetched with each, or none of what follows but the stream.
template <int kRows, int kFetch>
__attribute__((noinline)) void add_group(const Tile& tile, int64_t g, const char* fetch,
                                         int64_t further, const float* scale) {
  // A short tile waits for its sums unless it has two of each.
  constexpr bool kTwo = kRows <= 2;
  const int64_t stride = tile.stride, count = tile.group_words;
  const uint32_t* words = tile.words + g * count * kW4Panel;
  const int8_t* codes = tile.codes + g * count * 8;
  const int8_t* const end = codes + count * 8;
  Sums<kRows> sums, more;
  if constexpr (kFetch == 0) {
    const auto* const soon = static_cast<const char*>(tile.scale);
    const int64_t bytes = kW4Panel * (tile.scale_dtype == DType::kFloat32 ? 4 : 2);
    for (int64_t i = 0; i < bytes; i += kLineBytes) {
      __builtin_prefetch(soon + (g + kGroupsAhead) * bytes + i);
    }
    if (tile.zero_point) __builtin_prefetch(tile.zero_point + (g + kGroupsAhead) * kW4Panel);
  }
  start<kRows>(sums, tile, g);
  if constexpr (kTwo) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows * kVectors; ++i) {
      more[i / kVectors][i % kVectors] = _mm512_setzero_si512();
    }
  }
  for (; codes != end; words += kW4Panel, codes += 8) {
    if constexpr (kFetch == 0) {
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) __builtin_prefetch(words + kWordsAhead + i * kLanes);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kFetch; ++i) __builtin_prefetch(fetch + i * kLineBytes, 0, 2);
    fetch += further;
    add_half<false, kRows>(sums, words, codes, stride);
    // The words are loaded once more: kept, they would take four registers too many.
    asm("" : "+r"(words));
    add_half<true, kRows>(kTwo ? more : sums, words, codes, stride);
    pin<kRows>(sums);
  }
  if constexpr (kTwo) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows * kVectors; ++i) {
      __m512i& sum = sums[i / kVectors][i % kVectors];
      sum = _mm512_add_epi32(sum, more[i / kVectors][i % kVectors]);
    }
  }
  pin<kRows>(sums);
  add_scaled<kRows>(sums, scale, tile.sums);
}

// The scales of kCols vectors of columns.
template <int kCols>
QK_INLINE void load_scales(const Tile& tile, int64_t at, F32 (&scale)[kCols]) {
  const auto load_all = [&]<class T>(T) {
#pragma GCC unroll 4
    for (int v = 0; v < kCols; ++v) {
      scale[v] = load(static_cast<const T*>(tile.scale) + at + v * kLanes, Full{});
    }
  };
  tile.scale_dtype == DType::kFloat32   ? load_all(float{})
  : tile.scale_dtype == DType::kFloat16 ? load_all(Half{})
                                        : load_all(BFloat16{});
}

// All groups of whole words by kCols vectors of columns, sums of both kinds in registers: short
// groups would spend a third of the time on those in memory. kFetch lines are fetched with a word.
template <int kRows, int kCols, int kFetch>
__attribute__((noinline)) void add_groups(const Tile& tile, int64_t col) {
  const int64_t stride = tile.stride, count = tile.group_words;
  const uint32_t* words = tile.words + tile.first * count * kW4Panel + col;
  const int8_t* codes = tile.codes + tile.first * count * 8;
  const char* fetch = tile.fetch;
  float* const to = tile.sums + col;
  const __m512i low = _mm512_set1_epi8(15);
  F32 total[kRows][kCols];
  each<kRows>([&](auto i) {
    each<kCols>([&](auto v) { total[i][v] = load(to + i * kW4Panel + v * kLanes, Full{}); });
  });
  for (int64_t g = tile.first; g < tile.last; ++g) {
    __m512i sums[kRows][kCols];
    if (tile.zero_point) {
      each<kCols>([&](auto v) {
        const __m512i zero = _mm512_add_epi32(
            _mm512_set1_epi32(8),
            load_signed(tile.zero_point + g * kW4Panel + col + v * kLanes, Full{}).v);
        each<kRows>([&](auto i) {
          sums[i][v] = _mm512_mullo_epi32(zero, _mm512_set1_epi32(tile.minus[i * tile.groups + g]));
        });
      });
    } else {
      each<kRows>([&](auto i) {
        const __m512i sum = _mm512_set1_epi32(8 * tile.minus[i * tile.groups + g]);
        each<kCols>([&](auto v) { sums[i][v] = sum; });
      });
    }
    for (const int8_t* const end = codes + count * 8; codes != end; words += kW4Panel, codes += 8) {
      each<kFetch>([&](auto i) { __builtin_prefetch(fetch + i * kLineBytes, 0, 2); });
      fetch += kFetch * kLineBytes;
      each<2>([&](auto high) {
        __m512i weights[kCols];
        each<kCols>([&](auto v) {
          const __m512i both = _mm512_loadu_si512(words + v * kLanes);
          weights[v] = _mm512_and_si512(high ? _mm512_srli_epi16(both, 4) : both, low);
        });
        each<kRows>([&](auto i) {
          int32_t four;
          std::memcpy(&four, codes + i * stride + high * 4, sizeof(four));
          const __m512i a = _mm512_set1_epi32(four);
          each<kCols>([&](auto v) { sums[i][v] = _mm512_dpbusd_epi32(sums[i][v], weights[v], a); });
        });
      });
    }
    F32 scale[kCols];
    load_scales(tile, g * kW4Panel + col, scale);
    each<kRows>([&](auto i) {
      each<kCols>([&](auto v) {
        const F32 sum = {_mm512_maskz_cvtepi32_ps(0xffff, sums[i][v])};
        total[i][v] = total[i][v] + sum * scale[v];
      });
    });
  }
  each<kRows>([&](auto i) {
    each<kCols>([&](auto v) { store(to + i * kW4Panel + v * kLanes, total[i][v], Full{}); });
  });
}

template <int kRows, int kFetch>
QK_INLINE void tile_of(const Tile& tile) {
  const int64_t further = tile.more ? kFetch * kLineBytes : 0;
  const char* fetch = tile.fetch;
  float wide[kW4Panel];
  for (int64_t g = tile.first; g < tile.last; ++g, fetch += further * tile.group_words) {
    add_group<kRows, kFetch>(tile, g, fetch, further, load_scales(tile, g, wide));
  }
}

// Of groups that begin or end within a word.
template <int kRows>
__attribute__((noinline)) void ragged_tile_of(const Tile& tile) {
  float wide[kW4Panel];
  for (int64_t g = tile.first; g < tile.last; ++g) {
    const float* const scale = load_scales(tile, g, wide);
    Sums<kRows> sums;
    start<kRows>(sums, tile, g);
    for (int64_t q = group_begin(tile, g); q < group_end(tile, g); ++q) {
      const uint32_t* const words = tile.words + q / 2 * kW4Panel;
      const int8_t* const codes = tile.codes + q / 2 * 8;
      if (q % 2) {
        add_half<true, kRows>(sums, words, codes, tile.stride);
      } else {
        add_half<false, kRows>(sums, words, codes, tile.stride);
      }
    }
    add_scaled<kRows>(sums, scale, tile.sums);
  }
}

template <int kRows>
QK_INLINE void tile_of(const Tile& tile) {
  if (tile.group_words == 0) return ragged_tile_of<kRows>(tile);
  if (tile.rate == 0) return tile_of<kRows, 0>(tile);
  // Tiles are of like heights: one of two rows is alone.
  if constexpr (kRows > 2) {
    if (tile.group_words > kShortWords) {
      return tile.rate == 2 ? tile_of<kRows, 2>(tile) : tile_of<kRows, 1>(tile);
    }
    !tile.more       ? add_groups<kRows, 2, 0>(tile, 0)
    : tile.rate == 2 ? add_groups<kRows, 2, 2>(tile, 0)
                     : add_groups<kRows, 2, 1>(tile, 0);
    add_groups<kRows, 2, 0>(tile, 2 * kLanes);
  }
}

void run_tile(const Tile& tile) {
  switch (tile.rows) {
    case 1:
      return tile_of<1>(tile);
    case 2:
      return tile_of<2>(tile);
    case 3:
      return tile_of<3>(tile);
    case 4:
      return tile_of<4>(tile);
    case 5:
      return tile_of<5>(tile);
    default:
      return tile_of<6>(tile);
  }
}

}  // namespace
}  // namespace qk::avx512
