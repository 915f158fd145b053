// How the GEMMs over panels of weights (cpu/panel_gemm.h) are spread over threads.
#pragma once

#include "cpu/panel_gemm.h"
#include "ops/cpu_ops.h"

namespace qk::cpu {

// f(panel, first tile, end tile): every panel with every block of tiles. A thread takes panels in a
// row, whose packed words are neighbours, while enough are left for the others.
template <typename Body>
void parallel_panels(const PackedRows& x, int64_t panels, const Body& body) {
  constexpr int64_t kBlock = 86;  // tiles: what a pass over a panel is worth
  const int64_t tiles = x.tiles(), blocks = (tiles + kBlock - 1) / kBlock;
  if (blocks == 1) {
    return parallel_stages(
        std::min<int64_t>(panels, torch::stable::get_num_threads()), 0, [](int64_t, int64_t) {},
        panels, [&](int64_t panel, int64_t, int64_t) { body(panel, int64_t{0}, tiles); });
  }
  const int64_t run =
      std::max<int64_t>(1, panels / (4 * static_cast<int64_t>(torch::stable::get_num_threads())));
  const int64_t runs = (panels + run - 1) / run;
  current_isa();  // a wrong QUANTKIT_ISA is said here: see parallel_rows
  parallel_queue(runs * blocks, [&](int64_t i) {
    const int64_t b = i / runs, first = i % runs * run;
    for (int64_t p = first; p < std::min(panels, first + run); ++p) {
      body(p, tiles * b / blocks, tiles * (b + 1) / blocks);
    }
  });
}

}  // namespace qk::cpu
