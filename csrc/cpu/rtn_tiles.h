// How rtn.h's kernels go over a matrix: each row of blocks in tiles that stay in a cache between
// reading the extremes and writing the codes: L1 for rows, L2 for blocks of many rows.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/rtn.h"

namespace qk {

// x [rows, cols], element_bytes each, `stride` elements from row to row; blocks [block_rows,
// block_cols] with one scale each, row-major. q has codes of q_bits each, q_row bytes from row to
// row.
struct RtnMatrix {
  const void* x;
  int64_t element_bytes, stride;
  int64_t rows, cols;
  int64_t block_rows, block_cols;
  void* q;
  int64_t q_bits, q_row;
  float* scale;
  int8_t* zero_point;  // null for none
};

class RtnTiles {
 public:
  explicit RtnTiles(const RtnMatrix& matrix) : m_(matrix) {
    // A multiple of eight blocks, so that no two tiles share a word of packed codes.
    const int64_t step = 8 * m_.block_cols;
    const int64_t wanted = m_.block_rows == 1 ? kRowElements : kElements / m_.block_rows;
    width_ = std::min(m_.cols, std::max<int64_t>(1, wanted / step) * step);
    across_ = (m_.cols + width_ - 1) / width_;
  }

  // Blocks of so many rows no longer stay in a cache: extremes and codes are two passes then.
  static bool fit(int64_t block_rows, int64_t block_cols) {
    return block_rows == 1 || (block_rows <= 256 && block_rows * block_cols <= kElements);
  }

  int64_t width() const { return width_; }
  int64_t elements() const { return m_.block_rows * width_; }
  int64_t count() const { return (m_.rows + m_.block_rows - 1) / m_.block_rows * across_; }

  // Tile i; `more`: the one behind it is next.
  BlockRow at(int64_t i, bool more) const {
    const int64_t g = i / across_, row = g * m_.block_rows, col = i % across_ * width_;
    const int64_t grid_cols = (m_.cols + m_.block_cols - 1) / m_.block_cols;
    const int64_t first = g * grid_cols + col / m_.block_cols;
    return {begin(i),
            more ? begin(i + 1) : nullptr,
            m_.stride,
            std::min(m_.block_rows, m_.rows - row),
            std::min(width_, m_.cols - col),
            m_.block_cols,
            static_cast<char*>(m_.q) + row * m_.q_row + col * m_.q_bits / 8,
            m_.q_row,
            m_.scale + first,
            m_.zero_point ? m_.zero_point + first : nullptr};
  }

 private:
  static constexpr int64_t kRowElements = 4096;
  static constexpr int64_t kElements = 128 * 1024;

  const void* begin(int64_t i) const {
    const int64_t element = i / across_ * m_.block_rows * m_.stride + i % across_ * width_;
    return static_cast<const char*>(m_.x) + element * m_.element_bytes;
  }

  RtnMatrix m_;
  int64_t width_, across_;
};

}  // namespace qk
