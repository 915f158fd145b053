// How the GEMMs over panels of weights (cpu/panel_gemm.h) are spread over threads.
#pragma once

#include "cpu/panel_gemm.h"
#include "ops/cpu_ops.h"

namespace qk::cpu {

// Asks for `bytes` from `data` on, of which a thread reads a few at once: all of them together are
// here sooner than one after the other.
inline void fetch(const void* data, int64_t bytes) {
  const char* const p = static_cast<const char*>(data);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i);
}

// f(panel, first tile, end tile): every panel with every block of tiles. A thread takes panels in a
// row, whose packed words are neighbours, while enough are left for the others. `words(panel)` are
// a panel's packed words, [steps][kPanelCols].
template <typename Words, typename Body>
void parallel_panels(const PackedRows& x, int64_t panels, const Words& words, const Body& body) {
  constexpr int64_t kBlock = 86;  // tiles: what a pass over a panel is worth
  const int64_t tiles = x.tiles(), blocks = (tiles + kBlock - 1) / kBlock;
  if (blocks == 1) {
    // x was written by one thread, and lines that another one wrote are slow to come. The kernels
    // ask for a panel's words so far ahead that they do not for its first ones.
    constexpr int64_t kRows = 16 << 10, kFirst = 16 << 10;
    const auto soon = [&](int64_t panel) {
      fetch(x.words, std::min<int64_t>(kRows, x.rows * x.depth * 4));
      fetch(words(panel), kFirst);
    };
    return parallel_stages(
        std::min<int64_t>(panels, torch::stable::get_num_threads()), soon, 0,
        [](int64_t, int64_t) {}, panels,
        [&](int64_t panel, int64_t, int64_t) { body(panel, int64_t{0}, tiles); });
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
