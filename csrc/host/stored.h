// Weights and their scales as safetensors files hold them, read into memory some rows at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cpu/types.h"
#include "mapped_file.h"

namespace quantkit::host {

// The kernels' name for a safetensors dtype; std::invalid_argument for one that they lack.
qk::DType dtype_of(const std::string& name);
std::int64_t size_of(qk::DType dtype);

// Bytes [offset, offset + nbytes) of the file, by read(2): for some megabytes that is faster than
// to map them.
void read_at(const MappedFile& file, std::size_t offset, void* to, std::size_t nbytes);

// Scales of blocks [rows, cols] as fp32, from F32, BF16, F16 or, powers of two, F8_E8M0. All of
// them are in memory.
class Scales {
 public:
  Scales(const MappedFile& file, std::size_t begin, const std::string& dtype, std::int64_t rows,
         std::int64_t cols);

  const std::vector<float>& values() const { return values_; }
  std::int64_t rows() const { return rows_; }
  std::int64_t cols() const { return cols_; }
  bool finite() const;
  bool positive() const;  // all of them, and finite
  float largest() const;

 private:
  std::int64_t rows_, cols_;
  std::vector<float> values_;
};

// Values that `dtype` can hold exactly, in it.
std::vector<std::byte> stored_as(qk::DType dtype, const std::vector<float>& values);

// A weight [rows, cols] in F32, BF16 or F16; or in FP8 with scales for blocks, which is read as
// code * scale rounded to `dtype`. Keeps the file.
class Weight {
 public:
  Weight(std::shared_ptr<const MappedFile> file, std::size_t begin, const std::string& dtype,
         std::int64_t rows, std::int64_t cols);
  Weight(std::shared_ptr<const MappedFile> file, std::size_t begin, const std::string& dtype,
         std::int64_t rows, std::int64_t cols, Scales scales, std::int64_t block_rows,
         std::int64_t block_cols);

  std::int64_t rows() const { return rows_; }
  std::int64_t cols() const { return cols_; }
  qk::DType dtype() const { return dtype_; }
  // How many rows are worked on at once: some `part` bytes of them, and a multiple of both the
  // block's rows and of 128, which fill words of zero points.
  std::int64_t step(std::int64_t part, std::int64_t block_rows) const;
  // Rows [first, end) to `to`; first is a multiple of 128 and of `step`.
  void read(std::int64_t first, std::int64_t end, std::vector<char>& to) const;

 private:
  std::shared_ptr<const MappedFile> file_;
  std::size_t begin_;
  qk::DType dtype_;
  std::int64_t rows_, cols_;
  std::optional<Scales> scales_;
  std::int64_t block_rows_ = 1, block_cols_ = 1;
};

}  // namespace quantkit::host
