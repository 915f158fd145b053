#include "rounding.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "cpu/error.h"
#include "cpu/pack.h"
#include "cpu/quantize.h"
#include "cpu/reduce.h"
#include "cpu/rtn_tiles.h"
#include "cpu/scale.h"

namespace quantkit::host {
namespace {

using qk::DType;

// The grid of blocks over a weight.
struct Blocks {
  Blocks(const Weight& weight, const Rounding& how)
      : rows(how.block_rows == -1 ? weight.rows() : how.block_rows),
        cols(how.block_cols == -1 ? weight.cols() : how.block_cols),
        grid_rows(weight.rows() == 0 ? 0 : (weight.rows() - 1) / rows + 1),
        grid_cols(weight.cols() == 0 ? 0 : (weight.cols() - 1) / cols + 1) {}
  std::int64_t rows, cols;
  std::int64_t grid_rows, grid_cols;
};

// Extremes, scales and codes of a weight's parts.
class Rounder {
 public:
  Rounder(const Weight& weight, const Rounding& how)
      : how_(how),
        dtype_(weight.dtype()),
        cols_(weight.cols()),
        blocks_(weight, how),
        // All rows share a scale: it is known only when all of them have been seen.
        of_all_(how.block_rows == -1),
        scale_(static_cast<std::size_t>(blocks_.grid_rows * blocks_.grid_cols)),
        zero_point_(how.symmetric ? 0 : scale_.size()) {}

  bool of_all() const { return of_all_; }
  const Blocks& blocks() const { return blocks_; }
  const std::vector<float>& scale() const { return scale_; }
  const std::vector<std::int8_t>& zero_point() const { return zero_point_; }

  // Takes rows into the extremes of the whole weight; whether they are finite.
  bool look_at(const void* x, std::int64_t rows) {
    std::vector<float> low(scale_.size()), high(scale_.size());
    extremes(x, rows, low.data(), high.data());
    const bool begins = low_.empty();
    if (begins) {
      low_ = low;
      high_ = high;
    }
    for (std::size_t i = 0; i < low.size(); ++i) {
      if (!std::isfinite(low[i]) || !std::isfinite(high[i])) return false;
      low_[i] = std::min(low_[i], low[i]);
      high_[i] = std::max(high_[i], high[i]);
    }
    return true;
  }
  void looked_at_all() { scales(low_.data(), high_.data(), 0, blocks_.grid_cols); }

  // Codes of rows from `first` on, row_bytes each, to q; whether their scales are finite.
  bool round(const void* x, std::int64_t first, std::int64_t rows, char* q) {
    if (of_all_) {
      codes(x, rows, rows, 0, q);
      return true;
    }
    const std::int64_t begin = first / blocks_.rows * blocks_.grid_cols;
    const std::int64_t count = (rows + blocks_.rows - 1) / blocks_.rows * blocks_.grid_cols;
    if (qk::RtnTiles::fit(blocks_.rows, blocks_.cols)) {
      in_tiles(x, rows, begin, q);
    } else {
      std::vector<float> low(static_cast<std::size_t>(count)), high(low.size());
      const std::int64_t stride = cols_ * size_of(dtype_);
      for (std::int64_t r = 0; r < rows; r += blocks_.rows) {
        const std::int64_t at = r / blocks_.rows * blocks_.grid_cols;
        extremes(static_cast<const char*>(x) + r * stride, std::min(blocks_.rows, rows - r),
                 low.data() + at, high.data() + at);
      }
      scales(low.data(), high.data(), begin, count);
      codes(x, rows, blocks_.rows, begin, q);
    }
    const auto from = scale_.begin() + begin;
    return std::all_of(from, from + count, [](float value) { return std::isfinite(value); });
  }

 private:
  // Of one row of blocks; low is not set where scales are symmetric.
  void extremes(const void* x, std::int64_t rows, float* low, float* high) {
    scratch_.resize(static_cast<std::size_t>(qk::reduce_scratch_bytes(cols_)));
    if (how_.symmetric) {
      qk::reduce_kernels().absmax(dtype_, x, cols_, rows, cols_, blocks_.cols, scratch_.data(),
                                  high);
    } else {
      qk::reduce_kernels().minmax(dtype_, x, cols_, rows, cols_, blocks_.cols, scratch_.data(), low,
                                  high);
    }
  }

  void scales(const float* low, const float* high, std::int64_t begin, std::int64_t count) {
    if (how_.symmetric) {
      qk::scale_kernels().symmetric(high, count, how_.divisor, how_.scale_dtype,
                                    scale_.data() + begin);
    } else {
      qk::scale_kernels().asymmetric(low, high, count, how_.q_min, how_.q_max, how_.scale_dtype,
                                     scale_.data() + begin, zero_point_.data() + begin);
    }
  }

  void in_tiles(const void* x, std::int64_t rows, std::int64_t begin, char* q) {
    const std::int64_t bits = how_.packed ? how_.bits : 8;
    const qk::RtnTiles tiles({x, size_of(dtype_), cols_, rows, cols_, blocks_.rows, blocks_.cols, q,
                              bits, how_.row_bytes(cols_), scale_.data() + begin,
                              how_.symmetric ? nullptr : zero_point_.data() + begin});
    const qk::RtnInt integers{how_.q_min,   how_.q_max,       how_.symmetric,
                              how_.divisor, how_.scale_dtype, how_.packed ? how_.bits : 0};
    scratch_.resize(static_cast<std::size_t>(qk::rtn_scratch_bytes(tiles.width())));
    for (std::int64_t i = 0, n = tiles.count(); i < n; ++i) {
      const qk::BlockRow tile = tiles.at(i, i + 1 < n);
      if (how_.fp8) {
        qk::rtn_kernels().rtn_fp8(dtype_, DType::kFloat8E4M3, tile, scratch_.data());
      } else {
        qk::rtn_kernels().rtn_int(dtype_, integers, tile, scratch_.data());
      }
    }
  }

  // With the scales from `begin` on, which are known.
  void codes(const void* x, std::int64_t rows, std::int64_t block_rows, std::int64_t begin,
             char* q) {
    const qk::Rows all{x, cols_, cols_, 0, rows};
    const qk::Scales grid{scale_.data() + begin,
                          how_.symmetric ? nullptr : zero_point_.data() + begin, blocks_.grid_cols,
                          block_rows, blocks_.cols};
    if (how_.fp8) {
      qk::quantize_kernels().quantize_fp8(dtype_, all, grid, DType::kFloat8E4M3,
                                          reinterpret_cast<std::uint8_t*>(q));
      return;
    }
    bytes_.resize(how_.packed ? static_cast<std::size_t>(rows * cols_) : 0);
    auto* made = how_.packed ? bytes_.data() : reinterpret_cast<std::int8_t*>(q);
    qk::quantize_kernels().quantize_int(dtype_, all, grid, how_.q_min, how_.q_max, made);
    for (std::int64_t r = 0; how_.packed && r < rows; ++r) {
      qk::pack_kernels().pack(made + r * cols_, cols_, how_.bits,
                              reinterpret_cast<std::int32_t*>(q + r * how_.row_bytes(cols_)));
    }
  }

  Rounding how_;
  DType dtype_;
  std::int64_t cols_;
  Blocks blocks_;
  bool of_all_;
  std::vector<float> scale_;
  std::vector<std::int8_t> zero_point_;
  std::vector<float> low_, high_;
  std::vector<char> scratch_;
  std::vector<std::int8_t> bytes_;
};

// Rows from `first` on that have an exponent of ones: NaN or Inf.
std::vector<std::int64_t> not_finite(DType dtype, const std::vector<char>& x, std::int64_t cols,
                                     std::int64_t first, std::int64_t rows) {
  const auto odd = [&](std::int64_t i) {
    if (dtype == DType::kFloat32) {
      std::uint32_t bits;
      std::memcpy(&bits, x.data() + 4 * i, sizeof(bits));
      return (~bits & 0x7f800000) == 0;
    }
    std::uint16_t bits;
    std::memcpy(&bits, x.data() + 2 * i, sizeof(bits));
    return (~bits & (dtype == DType::kFloat16 ? 0x7c00 : 0x7f80)) == 0;
  };
  std::vector<std::int64_t> found;
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t i = r * cols; i < (r + 1) * cols; ++i) {
      if (!odd(i)) continue;
      found.push_back(first + r);
      break;
    }
  }
  return found;
}

// Written, and given to the disk at once.
void put(const Place& place, const void* data, std::size_t nbytes, std::size_t at = 0) {
  place.file->write(data, nbytes, place.offset + at);
  place.file->start_writeback(place.offset + at, place.offset + at + nbytes);
}

// int8 [rows, cols] -> words [words along the rows, cols], and back.
std::vector<std::int32_t> packed_rows(const std::vector<std::int8_t>& values, std::int64_t rows,
                                      std::int64_t cols, int bits) {
  const std::int64_t words = (rows * bits + 31) / 32;
  std::vector<std::int32_t> result(static_cast<std::size_t>(words * cols)), column(words);
  std::vector<std::int8_t> codes(static_cast<std::size_t>(rows));
  for (std::int64_t c = 0; c < cols; ++c) {
    for (std::int64_t r = 0; r < rows; ++r) codes[r] = values[r * cols + c];
    qk::pack_kernels().pack(codes.data(), rows, bits, column.data());
    for (std::int64_t w = 0; w < words; ++w) result[w * cols + c] = column[w];
  }
  return result;
}

std::vector<std::int8_t> unpacked_rows(const std::vector<std::int32_t>& packed, std::int64_t rows,
                                       std::int64_t cols, int bits) {
  const std::int64_t words = (rows * bits + 31) / 32;
  std::vector<std::int8_t> result(static_cast<std::size_t>(rows * cols)), codes(rows);
  std::vector<std::int32_t> column(static_cast<std::size_t>(words));
  for (std::int64_t c = 0; c < cols; ++c) {
    for (std::int64_t w = 0; w < words; ++w) column[w] = packed[w * cols + c];
    qk::pack_kernels().unpack(column.data(), rows, bits, codes.data());
    for (std::int64_t r = 0; r < rows; ++r) result[r * cols + c] = codes[r];
  }
  return result;
}

}  // namespace

std::optional<std::vector<std::int64_t>> round_weight(const Weight& weight, const Rounding& how,
                                                      std::int64_t part, Place codes, Place scales,
                                                      std::optional<Place> zero_points) {
  const std::int64_t rows = weight.rows(), cols = weight.cols();
  const std::int64_t step = weight.step(part, how.block_rows), row_bytes = how.row_bytes(cols);
  Rounder rounder(weight, how);
  if (rows == 0 || cols == 0) return std::nullopt;
  std::vector<char> x, q;
  if (rounder.of_all()) {
    for (std::int64_t first = 0; first < rows; first += step) {
      const std::int64_t count = std::min(step, rows - first);
      weight.read(first, first + count, x);
      if (!rounder.look_at(x.data(), count))
        return not_finite(weight.dtype(), x, cols, first, count);
    }
    rounder.looked_at_all();
  }
  for (std::int64_t first = 0; first < rows; first += step) {
    const std::int64_t count = std::min(step, rows - first);
    weight.read(first, first + count, x);
    q.resize(static_cast<std::size_t>(count * row_bytes));
    if (!rounder.round(x.data(), first, count, q.data()))
      return not_finite(weight.dtype(), x, cols, first, count);
    put(codes, q.data(), q.size(), static_cast<std::size_t>(first * row_bytes));
  }
  const std::vector<std::byte> stored = stored_as(how.scale_dtype, rounder.scale());
  put(scales, stored.data(), stored.size());
  if (zero_points) {
    const Blocks& blocks = rounder.blocks();
    const auto words =
        packed_rows(rounder.zero_point(), blocks.grid_rows, blocks.grid_cols, how.bits);
    put(*zero_points, words.data(), words.size() * sizeof(words[0]));
  }
  return std::nullopt;
}

Difference compare_weight(const Weight& weight, const Rounding& how, std::int64_t part, Found codes,
                          const Scales& scales, std::optional<Found> zero_points) {
  const std::int64_t rows = weight.rows(), cols = weight.cols();
  const std::int64_t step = weight.step(part, how.block_rows), row_bytes = how.row_bytes(cols);
  const Blocks blocks(weight, how);
  if (scales.rows() != blocks.grid_rows || scales.cols() != blocks.grid_cols) {
    throw std::invalid_argument("scales of another grid than the blocks make");
  }
  if (rows == 0 || cols == 0) return {};
  std::vector<std::int8_t> zeros;
  if (zero_points) {
    std::vector<std::int32_t> words(
        static_cast<std::size_t>((blocks.grid_rows * how.bits + 31) / 32 * blocks.grid_cols));
    read_at(*zero_points->file, zero_points->offset, words.data(), words.size() * sizeof(words[0]));
    zeros = unpacked_rows(words, blocks.grid_rows, blocks.grid_cols, how.bits);
  }
  Difference found;
  std::vector<char> x, q, bytes;
  std::vector<double> by_row;
  for (std::int64_t first = 0; first < rows; first += step) {
    const std::int64_t count = std::min(step, rows - first);
    weight.read(first, first + count, x);
    q.resize(static_cast<std::size_t>(count * row_bytes));
    read_at(*codes.file, codes.offset + static_cast<std::size_t>(first * row_bytes), q.data(),
            q.size());
    if (how.packed) {
      bytes.resize(static_cast<std::size_t>(count * cols));
      for (std::int64_t r = 0; r < count; ++r) {
        qk::pack_kernels().unpack(reinterpret_cast<const std::int32_t*>(q.data() + r * row_bytes),
                                  cols, how.bits,
                                  reinterpret_cast<std::int8_t*>(bytes.data()) + r * cols);
      }
      q.swap(bytes);
    }
    by_row.assign(static_cast<std::size_t>(4 * count), 0.0);
    const std::int64_t at = how.block_rows == -1 ? 0 : first / blocks.rows * blocks.grid_cols;
    qk::error_kernels().quantization_error(
        weight.dtype(), {x.data(), cols, cols, 0, count},
        how.fp8 ? DType::kFloat8E4M3 : DType::kInt8, {q.data(), cols, cols, 0, count},
        {scales.values().data() + at, zero_points ? zeros.data() + at : nullptr, blocks.grid_cols,
         how.block_rows == -1 ? count : blocks.rows, blocks.cols},
        by_row.data());
    Difference sum;  // of the part first, so that no rounding adds up over a whole large weight
    const auto take = [](double& most, double value) {
      most = most > value || std::isnan(most) ? most : value;
    };
    for (std::int64_t r = 0; r < count; ++r) {
      sum.noise += by_row[4 * r];
      sum.signal += by_row[4 * r + 1];
      take(found.largest, by_row[4 * r + 2]);
      take(found.peak, by_row[4 * r + 3]);
    }
    found.noise += sum.noise;
    found.signal += sum.signal;
  }
  return found;
}

bool same_bytes(Found a, Found b, std::size_t nbytes, std::size_t part) {
  std::vector<char> left(std::min(nbytes, part)), right(left.size());
  for (std::size_t done = 0; done < nbytes;) {
    const std::size_t count = std::min(part, nbytes - done);
    read_at(*a.file, a.offset + done, left.data(), count);
    read_at(*b.file, b.offset + done, right.data(), count);
    if (std::memcmp(left.data(), right.data(), count) != 0) return false;
    done += count;
  }
  return true;
}

}  // namespace quantkit::host
