// The tile of w4a8.h where there are no units for dot products of bytes: products are summed in 16
// bits, which holds those of kNarrow units of four columns (two products of each in a lane, up to
// 15 * 127), then in 32.
//
// The including file has kTileRows, Narrow, zero_narrow, Nibbles, load_nibbles, FourCodes,
// load_codes, add_products and widen.
#pragma once

#include "cpu/w4a8_impl.h"

namespace qk::QK_ISA {
namespace {

constexpr int64_t kNarrow = 8;
static_assert(kNarrow * 2 * 15 * 127 <= 32767);

template <bool kHigh, int kRows>
QK_INLINE void add_half(Narrow (&sums)[kRows], const uint32_t* words, const int8_t* codes,
                        int64_t stride) {
  const Nibbles weights = load_nibbles<kHigh>(words);
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
    sums[i] = add_products(sums[i], weights, load_codes(codes + i * stride + (kHigh ? 4 : 0)));
  }
}

template <int kRows>
__attribute__((noinline)) void tile_of(const Tile& tile, int64_t column) {
  for (int64_t g = tile.first; g < tile.last; ++g) {
    I32 wide[kRows];
    I32 zero = broadcast(8);
    if (tile.zero_point) {
      zero = zero + load_signed(tile.zero_point + g * kW4Panel + column, Full{});
    }
    for (int i = 0; i < kRows; ++i) {
      wide[i] = multiply_low(zero, broadcast(static_cast<int>(tile.minus[i * tile.groups + g])));
    }
    for (int64_t q = group_begin(tile, g), end = group_end(tile, g); q < end;) {
      Narrow sums[kRows];
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) sums[i] = zero_narrow();
      const uint32_t* words = tile.words + q / 2 * kW4Panel + column;
      const int8_t* codes = tile.codes + q / 2 * 8;
      if (q % 2 == 0 && q + kNarrow <= end) {
        for (int k = 0; k < kNarrow / 2; ++k, words += kW4Panel, codes += 8) {
          add_half<false>(sums, words, codes, tile.stride);
          add_half<true>(sums, words, codes, tile.stride);
        }
        q += kNarrow;
      } else if (q % 2 == 0) {
        add_half<false>(sums, words, codes, tile.stride);
        q += 1;
      } else {
        add_half<true>(sums, words, codes, tile.stride);
        q += 1;
      }
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) wide[i] = wide[i] + widen(sums[i]);
    }
    float many[kW4Panel];
    const F32 scale = load(load_scales(tile, g, many) + column, Full{});
    for (int i = 0; i < kRows; ++i) {
      float* const to = tile.sums + i * kW4Panel + column;
      store(to, load(to, Full{}) + to_float(wide[i]) * scale, Full{});
    }
  }
}

template <int kRows>
void tile_of_rows(const Tile& tile, int64_t column) {
  if constexpr (kRows > 1) {
    if (tile.rows < kRows) return tile_of_rows<kRows - 1>(tile, column);
  }
  tile_of<kRows>(tile, column);
}

void run_tile(const Tile& tile) {
  // What follows comes a block at a time here: these kernels leave memory the time for it.
  if (tile.more) {
    const int64_t lines =
        ((group_end(tile, tile.last - 1) + 1) / 2 - group_begin(tile, tile.first) / 2) * tile.rate;
    for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(tile.fetch + i * kLineBytes, 0, 2);
  }
  for (int64_t column = 0; column < kW4Panel; column += kLanes) {
    tile_of_rows<kTileRows>(tile, column);
  }
}

}  // namespace
}  // namespace qk::QK_ISA
