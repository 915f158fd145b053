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

template <int kRows, int kFetch>
__attribute__((noinline)) void tile_of(const Tile& tile) {
  // A short tile waits for its sums unless it has two of each.
  constexpr bool kTwo = kRows <= 2;
  const char* fetch = tile.fetch;
  const int64_t further = tile.more ? kFetch * kLineBytes : 0;
  for (int64_t g = tile.first; g < tile.last; ++g) {
    Sums<kRows> sums, more;
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
        if constexpr (kTwo) more[i][v] = _mm512_setzero_si512();
      }
    }
    const int64_t begin = group_begin(tile, g), end = group_end(tile, g);
    const uint32_t* words = tile.words + begin / 2 * kW4Panel;
    const int8_t* codes = tile.codes + begin / 2 * 8;
    if (begin % 2) {
      add_half<true, kRows>(sums, words, codes, tile.stride);
      words += kW4Panel;
      codes += 8;
    }
    for (int64_t k = (begin + 1) / 2; k < end / 2; ++k, words += kW4Panel, codes += 8) {
#pragma GCC unroll 4
      for (int i = 0; i < kFetch; ++i) __builtin_prefetch(fetch + i * kLineBytes, 0, 2);
      fetch += further;
      add_half<false, kRows>(sums, words, codes, tile.stride);
      add_half<true, kRows>(kTwo ? more : sums, words, codes, tile.stride);
    }
    if (end % 2) add_half<false, kRows>(sums, words, codes, tile.stride);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const F32 scale = load_scale(tile, g, v * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        float* const to = tile.sums + i * kW4Panel + v * kLanes;
        const I32 sum = {kTwo ? _mm512_add_epi32(sums[i][v], more[i][v]) : sums[i][v]};
        store(to, load(to, Full{}) + to_float(sum) * scale, Full{});
      }
    }
  }
}

template <int kRows>
QK_INLINE void tile_of(const Tile& tile) {
  tile.rate == 4   ? tile_of<kRows, 4>(tile)
  : tile.rate == 2 ? tile_of<kRows, 2>(tile)
                   : tile_of<kRows, 1>(tile);
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
