// Which tile of the results a block works on: rows, those of one expert, panels of the weight, and
// a part of K.
#pragma once

#include "cuda/common/gemm_finish.h"

namespace qk::cuda {

// The tile that a block works on.
struct TilePlace {
  int expert, row, row_end;
  int panel;
  int split, first_unit, end_unit;
};

// The expert and the rows of row tile number `tile`, by the whole warp; no rows beyond the last.
__device__ inline TilePlace rows_of_tile(const Experts& experts, int rows, int tile,
                                         int tile_rows) {
  TilePlace place{};
  if (experts.count == 0) {
    place.row = tile * tile_rows;
    place.row_end = min(rows, place.row + tile_rows);
    return place;
  }
  const int lane = threadIdx.x % kWarp;
  int before = 0;  // tiles of the experts before
  for (int first = 0; first < experts.count; first += kWarp) {
    const int e = first + lane;
    const int begin = e < experts.count ? row_bound(experts, e, rows) : 0;
    const int end = e < experts.count ? max(row_bound(experts, e + 1, rows), begin) : 0;
    int until = (end - begin + tile_rows - 1) / tile_rows;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int other = shuffle_from(until, lane - step < 0 ? lane : lane - step);
      if (lane >= step) until += other;
    }
    until += before;
    // The first lane whose tiles reach beyond this one.
    int found = until > tile ? lane : kWarp;
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) found = min(found, shuffle_xor(found, mask));
    if (found < kWarp) {
      const int own = shuffle_from(until, found == 0 ? 0 : found - 1);
      const int start = shuffle_from(begin, found), stop = shuffle_from(end, found);
      place.expert = first + found;
      place.row = start + (tile - (found == 0 ? before : own)) * tile_rows;
      place.row_end = min(stop, place.row + tile_rows);
      return place;
    }
    before = shuffle_from(until, kWarp - 1);
  }
  return place;
}

constexpr int kBandTiles = 16;  // row tiles that share weights in the L2 cache

// Tile `index` of a plan: row tiles are neighbours within a band of them, then panels, so that
// weights are read once. By the whole warp.
__device__ inline TilePlace place_of_tile(const GemmArgs& args, const GemmPlan& plan, int64_t index,
                                          int tile_rows, int tile_panels, int units) {
  const int64_t of_band = int64_t{kBandTiles} * plan.panel_tiles * plan.splits;
  const int band = static_cast<int>(index / of_band);
  const int rest = static_cast<int>(index - band * of_band);
  const int tiles = min(kBandTiles, plan.row_tiles - band * kBandTiles);
  TilePlace place =
      rows_of_tile(args.experts, args.a.rows, band * kBandTiles + rest % tiles, tile_rows);
  place.panel = rest / tiles % plan.panel_tiles * tile_panels;
  place.split = rest / tiles / plan.panel_tiles;
  place.first_unit = place.split * plan.split_units;
  place.end_unit = min(units, place.first_unit + plan.split_units);
  return place;
}

}  // namespace qk::cuda
