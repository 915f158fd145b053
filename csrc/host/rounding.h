// A weight rounded to nearest on its way from one file to another, and the look back at it. Both
// take it through memory in parts of some rows, in the calling thread, so that a part is read,
// worked on and written while it is in the cache.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "mapped_file.h"
#include "output_file.h"
#include "stored.h"

namespace quantkit::host {

// What the codes are: e4m3, or integers with one scale (and zero point, unless symmetric) for each
// block; -1 is the whole extent.
struct Rounding {
  bool fp8;
  bool packed;  // integers of `bits` in words, else a byte each
  int bits;
  bool symmetric;
  int q_min, q_max;
  float divisor;  // the code of the largest magnitude, where symmetric
  qk::DType scale_dtype;
  std::int64_t block_rows, block_cols;

  std::int64_t row_bytes(std::int64_t cols) const {
    return packed ? (cols * bits + 31) / 32 * 4 : cols;
  }
};

// Where in a file something begins.
struct Place {
  const OutputFile* file;
  std::size_t offset;
};
struct Found {
  const MappedFile* file;
  std::size_t offset;
};

// Writes codes, scales (row-major, as scale_dtype) and zero points (packed along the rows) of
// `weight`, some `part` bytes of it at a time. Gives back nothing, or, if a part has scales that
// are not finite, the rows of it with NaN or Inf; then not all is written.
std::optional<std::vector<std::int64_t>> round_weight(const Weight& weight, const Rounding& how,
                                                      std::int64_t part, Place codes, Place scales,
                                                      std::optional<Place> zero_points);

// Sum of (x - x^)^2, sum of x^2, max |x - x^|, max |x| of a weight x and what its codes mean, x^.
struct Difference {
  double noise = 0, signal = 0, largest = 0, peak = 0;
};

// `codes` and `zero_points` are as round_weight writes them.
Difference compare_weight(const Weight& weight, const Rounding& how, std::int64_t part, Found codes,
                          const Scales& scales, std::optional<Found> zero_points);

// Whether `nbytes` of one file are those of another.
bool same_bytes(Found a, Found b, std::size_t nbytes, std::size_t part);

}  // namespace quantkit::host
