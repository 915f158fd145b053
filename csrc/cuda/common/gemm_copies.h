// The shapes of a product's tiles, and the stages of activations and words that go through shared
// memory: by asynchronous copies of 16 bytes, whose places are swizzled so that what a thread reads
// (gemm_weights.h) never meets another's bank, but for short units, where two do.
#pragma once

#include "cuda/common/gemm_tile.h"

namespace qk::cuda {

template <int kWarpsM_, int kWarpsN_, int kWarpsK_, int kTilesM_, int kUnits_, int kStages_>
struct Tiles {
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kWarpsK = kWarpsK_;
  static constexpr int kTilesM = kTilesM_, kUnits = kUnits_, kStages = kStages_;
  static constexpr int kThreads = kWarpsM * kWarpsN * kWarpsK * kWarp;
  static constexpr int kRows = kWarpsM * kTilesM * 16, kCols = kWarpsN * 32;
  static constexpr int kOwnUnits = kUnits / kWarpsK;  // of a warp in a stage
  // On a multiprocessor: two keep memory busier than one.
  static constexpr int kBlocks = kTilesM == 1 ? 2 : 1;
  static_assert(kUnits % 2 == 0 && kUnits % kWarpsK == 0 && kCols % kPanel == 0);
};

template <typename Weight, typename Shape>
struct GemmScratch {
  static constexpr int kRowChunks = Shape::kUnits * kUnitBytes<Weight> / 16;
  static constexpr int kWordRows = Shape::kUnits * 4 * Weight::kWords;
  static constexpr int kPanels = Shape::kCols / kPanel;

  alignas(16) unsigned char a[Shape::kStages][Shape::kRows][kRowChunks * 16];
  alignas(16) uint32_t words[Shape::kStages][kPanels][kWordRows][kPanel];

  // Where a chunk of 16 bytes lies in its row.
  __device__ static int a_place(int row, int chunk) { return (chunk ^ row % 2 * 4) * 16; }
  __device__ static int word_place(int row, int chunk) {
    return (chunk ^ row / Weight::kWords % 4 * 2) * 4;
  }
};

// Starts the copies of stage t of a tile's part of K.
template <typename Weight, typename Shape>
__device__ void load_stage(const GemmArgs& args, const TilePlace& place, int t,
                           GemmScratch<Weight, Shape>& scratch) {
  using Scratch = GemmScratch<Weight, Shape>;
  constexpr int kBytes = kUnitBytes<Weight>;
  const int stage = t % Shape::kStages, plane = t % args.a.planes;
  const int unit = place.first_unit + t / args.a.planes * Shape::kUnits;
  const int left = (place.end_unit - unit) * kBytes;  // bytes of a row within the split
  const int row_left = args.a.depth * (kBytes / Weight::kUnit) - unit * kBytes;
  const int bytes = min(left, row_left);
  const char* const a =
      static_cast<const char*>(args.a.data) + plane * args.a.plane_bytes + int64_t{unit} * kBytes;
  constexpr int kChunks = Shape::kRows * Scratch::kRowChunks;
  static_assert(kChunks % Shape::kThreads == 0);
#pragma unroll
  for (int i = 0; i < kChunks / Shape::kThreads; ++i) {
    const int index = i * Shape::kThreads + static_cast<int>(threadIdx.x);
    const int row = index / Scratch::kRowChunks, chunk = index % Scratch::kRowChunks;
    const int valid = place.row + row < place.row_end ? min(max(bytes - chunk * 16, 0), 16) : 0;
    const char* const from = valid > 0 ? a + (place.row + row) * args.a.row_bytes + chunk * 16
                                       : static_cast<const char*>(args.a.data);
    copy_async(&scratch.a[stage][row][Scratch::a_place(row, chunk)], from, valid);
  }
  const uint32_t* const words =
      static_cast<const uint32_t*>(args.weight.words) + place.expert * args.weight.expert_words;
  const int first_row = unit * 4 * Weight::kWords;
  constexpr int kWordChunks = Scratch::kPanels * Scratch::kWordRows * (kPanel / 4);
  static_assert(kWordChunks % Shape::kThreads == 0);
#pragma unroll
  for (int i = 0; i < kWordChunks / Shape::kThreads; ++i) {
    const int index = i * Shape::kThreads + static_cast<int>(threadIdx.x);
    const int chunk = index % (kPanel / 4), row = index / (kPanel / 4) % Scratch::kWordRows;
    const int panel = index / (kPanel / 4) / Scratch::kWordRows;
    const bool there = first_row + row < args.weight.word_rows &&
                       (place.panel + panel) * kPanel < args.weight.out_features;
    const uint32_t* const from = there ? words + (place.panel + panel) * args.weight.panel_words +
                                             int64_t{first_row + row} * kPanel + chunk * 4
                                       : words;
    copy_async(&scratch.words[stage][panel][row][Scratch::word_place(row, chunk)], from,
               there ? 16 : 0);
  }
}

}  // namespace qk::cuda
