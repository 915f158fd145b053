#include <cstring>

#include "cpu/w8a8.h"

namespace qk {

void w8a8_pack(const int8_t* codes, int64_t stride, int64_t rows, int64_t cols, int64_t panel,
               int8_t* packed) {
  const int64_t words = w8a8_words(cols), whole = cols / 4, first = panel * kPanel;
  int8_t* const out = packed + panel * w8a8_panel_bytes(cols);
  int32_t sums[kPanel] = {};
  // Few enough rows at a time that their lines stay in L1 when the stride is a power of two.
  constexpr int64_t kRows = 8;
  for (int64_t c = 0; c < kPanel; c += kRows) {
    const int64_t n = rows - first - c;  // rows that there are
    if (n < kRows) {
      for (int64_t w = 0; w < words; ++w) std::memset(out + (w * kPanel + c) * 4, 0, 4 * kRows);
    }
    const int64_t count = n < kRows ? n : kRows;
    const int8_t* const row = codes + (first + c) * stride;
    for (int64_t w = 0; w < whole; ++w) {
      for (int64_t i = 0; i < count; ++i) {
        std::memcpy(out + (w * kPanel + c + i) * 4, row + i * stride + w * 4, 4);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      if (whole < words) {
        int8_t last[4] = {};
        std::memcpy(last, row + i * stride + whole * 4, static_cast<size_t>(cols - whole * 4));
        std::memcpy(out + (whole * kPanel + c + i) * 4, last, 4);
      }
      for (int64_t k = 0; k < cols; ++k) sums[c + i] += row[i * stride + k];
    }
  }
  std::memcpy(out + words * 4 * kPanel, sums, sizeof(sums));
}

}  // namespace qk
