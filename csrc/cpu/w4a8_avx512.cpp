// The kernels of w4a8.h for AVX-512 VNNI: one instruction for four codes of 16 columns.
#include "cpu/simd_avx512.h"

namespace qk::avx512 {
namespace {
// 24 sums, 4 vectors of weights and one of codes in 32 registers.
constexpr int kTileRows = 6, kVectors = 4;
}  // namespace
}  // namespace qk::avx512

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
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    __m512i zero = _mm512_set1_epi32(8);
    if (tile.zero_point) {
      zero = _mm512_add_epi32(zero,
                              load_signed(tile.zero_point + g * kW4Panel + v * kLanes, Full{}).v);
    }
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

// One group of whole words, kFetch lines fetched with each.
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
  start<kRows>(sums, tile, g);
  if constexpr (kTwo) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows * kVectors; ++i) {
      more[i / kVectors][i % kVectors] = _mm512_setzero_si512();
    }
  }
  for (; codes != end; words += kW4Panel, codes += 8) {
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
  // Tiles are of like heights: one of two rows is alone.
  if constexpr (kRows <= 2) {
    tile_of<kRows, 0>(tile);
  } else {
    tile.rate == 4   ? tile_of<kRows, 4>(tile)
    : tile.rate == 2 ? tile_of<kRows, 2>(tile)
                     : tile_of<kRows, 1>(tile);
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
