// The layout of fp8_gemm.h: bytes moved about, at the speed of memory on any machine.
#include <algorithm>
#include <cstring>
#include <limits>

#include "cpu/fp8_gemm.h"
#include "cpu/rtn.h"

namespace qk {

void fp8_pack(const uint8_t* codes, int64_t stride, int64_t rows, int64_t cols, int64_t panel,
              uint8_t* packed) {
  const int64_t steps = fp8_steps(cols), first = panel * kPanelCols;
  uint8_t* const out = packed + panel * fp8_panel_bytes(cols);
  float nan[kPanelCols] = {};
  for (int64_t c = 0; c < kPanelCols; ++c) {
    const uint8_t* const row = codes + (first + c) * stride;
    const bool there = first + c < rows;
    bool found = false;
    for (int64_t s = 0; s < steps; ++s) {
      uint8_t four[4] = {};
      if (there) std::memcpy(four, row + 4 * s, std::min<int64_t>(4, cols - 4 * s));
      for (uint8_t code : four) found |= (code & 0x7f) == Float8E4M3::kNan;
      const uint8_t word[4] = {four[0], four[2], four[1], four[3]};
      std::memcpy(out + (s * kPanelCols + c) * 4, word, sizeof(word));
    }
    if (found) nan[c] = std::numeric_limits<float>::quiet_NaN();
  }
  std::memcpy(out + steps * 4 * kPanelCols, nan, sizeof(nan));
}

// A row as numbers, its scales, its codes, and what it takes to make them.
int64_t fp8_room_bytes(int64_t cols) { return 9 * (cols + 32) + rtn_scratch_bytes(cols) + 64; }

}  // namespace qk
